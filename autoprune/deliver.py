"""Hands policies over: exports them, applies them elsewhere, measures models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.compression.bank import VariantBank
from autoprune.config import RunConfig, TextConfig
from autoprune.errors import PolicyError, RunError
from autoprune.evaluation.provenance import made_for, measured_on
from autoprune.evaluation.workbench import Workbench
from autoprune.exporting.folder import load, write_export
from autoprune.exporting.verification import Verification, verify_export
from autoprune.plugins import Plugins, load_plugins
from autoprune.policy import Policy
from autoprune.reporting.card import model_card
from autoprune.reporting.observer import Observer
from autoprune.searching.ledger import Ledger
from autoprune.searching import objective as objectives
from autoprune.searching.plan import Plan
from autoprune.searching.rows import Trial

__all__ = ["ExportReport", "apply", "evaluate", "export", "load"]

SEED = 0
"""Decides which documents go to which split, where no run says so."""


@dataclass(frozen=True, eq=False)
class ExportReport:
    """An export that was written and verified.

    Attributes:
        folder: Where it is.
        target: Its export target.
        policy: What was exported.
        size_bytes: Of its weight files; as predicted, to the byte.
        metrics: What the policy scored on the report split.
        verified: What a fresh process found that loaded it again.
    """

    folder: Path
    target: str
    policy: Policy
    size_bytes: int
    metrics: Mapping[str, float]
    verified: Verification


def export(
    run_dir: str | Path,
    *,
    out: str | Path | None = None,
    trial: int | None = None,
    front: bool = False,
    target: str | None = None,
    force: bool = False,
    observer: Observer | None = None,
) -> list[ExportReport]:
    """Export policies of a run, verified: the winner, a trial, or the whole front.

    Args:
        run_dir: The run folder.
        out: Where; ``export-TARGET`` in the run folder by default. For a front, a
            folder of folders named after trials.
        trial: Number of a trial.
        front: Export every trial that no other beats.
        target: Export target; the run's own by default.
        force: Replace exports that are there already.
        observer: Hears of stages.

    Raises:
        RunError: If the folder holds no run, or not what is asked for.
        ExportError: If an export cannot be written or fails its verification.
    """
    folder = Path(run_dir)
    observer = observer or Observer()
    config = _config(folder)
    if trial is not None:
        _one(folder, trial)  # a wrong number is told before a model is loaded
    elif not front:
        _winner(folder)
    observer.stage("loading model and text")
    plan = Plan.make(config, load_plugins(config.plugins))
    name = target or config.export
    plan.plugins.get("exporters", name)
    found = _chosen(plan, folder, trial=trial, whole_front=front)
    reports = []
    for record, policy, bank in found:
        place = Path(out or folder / f"export-{name}")
        observer.stage(f"exporting trial {record['trial']} as {name}")
        reports.append(
            _export(
                plan.bench,
                bank,
                policy,
                place=place / f"trial-{record['trial']}" if front else place,
                target=name,
                record=record,
                plugins=config.plugins,
                force=force,
            )
        )
    return reports


def apply(
    policy: str | Path | Policy,
    *,
    model: str,
    out: str | Path,
    target: str = "packed",
    task: str = "causal-lm",
    text: TextConfig | None = None,
    force: bool = False,
    plugins: Sequence[str] = (),
    observer: Observer | None = None,
) -> ExportReport:
    """Compress another checkpoint of the same shape by a policy, and export it.

    Statistics are taken anew from that model, block by block, on the inputs that its
    own compressed blocks give.

    Args:
        policy: A policy, or the path of a ``policy.json``.
        model: Folder, hub id, GGUF file or ``demo``.
        out: Folder to write.
        target: Export target.
        task: What the model is for.
        text: Which text to take statistics from and to measure on.
        force: Replace an export that is there already.
        plugins: Modules to load beside the installed plugins.
        observer: Hears of stages.

    Raises:
        PolicyError: If the policy does not fit the model.
        ExportError: If the export cannot be written or fails its verification.
    """
    observer = observer or Observer()
    chosen = policy if isinstance(policy, Policy) else read_policy(policy)
    text = text or TextConfig()
    observer.stage("loading model and text")
    bench = _open(load_plugins(plugins), model, task, text, target)
    chosen = bench.actions.canonical_policy(chosen)
    bench.storages(chosen)  # a policy that does not fit is refused before any work
    bank = bench.bank(chosen)
    observer.stage("making variants")
    bank.make(bench.per_layer(chosen).items(), observer.advance)
    observer.stage("measuring on the report split")
    record = made_for(bench, chosen) | {
        "seed": SEED,
        "text": measured_on(bench, text, "report"),
        "figures": {
            "dense": bench.dense_metrics("report"),
            "compressed": bench.measure(chosen, bank, "report").metrics,
        },
    }
    observer.stage(f"exporting as {target}")
    return _export(
        bench, bank, chosen, place=Path(out), target=target, record=record,
        plugins=plugins, force=force,
    )


def evaluate(
    model: str,
    *,
    policy: str | Path | Policy | None = None,
    task: str = "causal-lm",
    text: TextConfig | None = None,
    target: str = "packed",
    plugins: Sequence[str] = (),
    observer: Observer | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a model on the report split, and a policy on it.

    Args:
        model: Folder, hub id, GGUF file or ``demo``.
        policy: A policy, or the path of a ``policy.json``; its variants are made on
            the inputs that its own compressed blocks give.
        task: What the model is for.
        text: Which text.
        target: Export target, for sizes.
        plugins: Modules to load beside the installed plugins.
        observer: Hears of stages.

    Returns:
        Metrics of ``dense``, and of ``policy`` if one is given.

    Raises:
        PolicyError: If the policy does not fit the model.
    """
    observer = observer or Observer()
    observer.stage("loading model and text")
    bench = _open(load_plugins(plugins), model, task, text or TextConfig(), target)
    observer.stage("measuring the dense model")
    found = {"dense": bench.dense_metrics("report")}
    if policy is not None:
        chosen = policy if isinstance(policy, Policy) else read_policy(policy)
        chosen = bench.actions.canonical_policy(chosen)
        bank = bench.bank(chosen)
        observer.stage("making variants")
        bank.make(bench.per_layer(chosen).items(), observer.advance)
        observer.stage("measuring the policy")
        found["policy"] = bench.measure(chosen, bank, "report").metrics
    return found


def read_policy(path: str | Path) -> Policy:
    """Read a policy from a file.

    Raises:
        PolicyError: If the file is missing or holds no policy.
    """
    try:
        return Policy.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise PolicyError(f"cannot read the policy {path}: {error}") from error


def _open(
    plugins: Plugins, model: str, task: str, text: TextConfig, target: str
) -> Workbench:
    return Workbench.open(
        plugins, model=model, task=task, text=text, target=target, seed=SEED
    )


def _export(
    bench: Workbench,
    bank: VariantBank,
    policy: Policy,
    *,
    place: Path,
    target: str,
    record: Mapping[str, Any],
    plugins: Sequence[str],
    force: bool,
) -> ExportReport:
    """Write one policy, and have a fresh process load and measure it."""
    measured = bench.measure(policy, bank, "report")
    storages = bench.storages(policy)
    exporter = bench.exporters[target]
    size = exporter.size_bytes(storages, bench.untouched)
    verified: list[Verification] = []

    def check(made: Path) -> Verification:
        verified.append(
            verify_export(
                made,
                bench.splits["report"].ids,
                task=bench.task.name,
                perplexity=measured.metrics["perplexity"],
                size_bytes=size,
                compute_dtype=bench.compute_dtype,
                plugins=plugins,
            )
        )
        return verified[0]

    dense = bench.scene().dense_storages
    sizes = {
        name: {
            "dense": other.size_bytes(dense, bench.untouched),
            "compressed": other.size_bytes(storages, bench.untouched),
        }
        for name, other in bench.exporters.items()
    }
    folder = write_export(
        exporter,
        bench.job(policy, bank),
        place,
        policy=policy,
        tokenizer=bench.tokenizer,
        size_bytes=size,
        record={**record, "sizes": sizes},
        card=model_card,
        check=check,
        force=force,
    )
    return ExportReport(folder, target, policy, size, measured.metrics, verified[0])


def _trials(folder: Path) -> list[Trial]:
    with Ledger.read(folder) as ledger:
        return ledger.trials()


def _one(folder: Path, number: int) -> Trial:
    trials = _trials(folder)
    for trial in trials:
        if trial.number == number:
            return trial
    raise RunError(
        f"{folder} has no trial {number}; it has {len(trials)}, counted from 0"
    )


def _winner(folder: Path) -> dict[str, Any]:
    path = folder / "policy.json"
    if not path.exists():
        raise RunError(
            f"{folder} has no winner yet: {path.name} is written when a search ends. Go "
            "on with 'autoprune search', or name a trial"
        )
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _config(folder: Path) -> RunConfig:
    path = folder / "config.yaml"
    if not path.exists():
        raise RunError(f"{folder} is no run folder: it has no {path.name}")
    return RunConfig.from_yaml(path)


def _chosen(
    plan: Plan, folder: Path, *, trial: int | None, whole_front: bool
) -> list[tuple[dict[str, Any], Policy, VariantBank]]:
    """Find what is to be exported: its record, the policy, and the bank it was measured with."""
    if whole_front:
        trials = objectives.front_in(_trials(folder), plan.front_goals)
    elif trial is not None:
        trials = [_one(folder, trial)]
    else:
        winner = _winner(folder)
        policy = Policy.from_dict(winner)
        reference = winner["reference"] and Policy.from_dict(winner["reference"])
        return [(winner, policy, plan.bench.bank(reference))]
    found = []
    for one in trials:
        measured = plan.bench.measure(one.policy, plan.bank, "report").metrics
        record = made_for(plan.bench, plan.reference) | {
            "trial": one.number,
            "seed": plan.config.search.seed,
            "text": measured_on(plan.bench, plan.config.text, "report"),
            "figures": {
                "dense": plan.bench.dense_metrics("report"),
                "compressed": measured,
            },
        }
        found.append((record, one.policy, plan.bank))
    return found
