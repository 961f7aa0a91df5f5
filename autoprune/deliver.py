"""Exports the policies of a run, each verified by a fresh process."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autoprune.compression.bank import VariantBank
from autoprune.errors import RunError
from autoprune.evaluation.provenance import bank_of, made_for, measured_on
from autoprune.evaluation.targets import check_target, sizes_by_target
from autoprune.evaluation.workbench import Workbench
from autoprune.exporting.folder import check_free, write_export
from autoprune.exporting.probe import Probe
from autoprune.exporting.verification import Expected, Verification, verify_export
from autoprune.models.computing import computing_in
from autoprune.plugins import load_plugins
from autoprune.policy import Policy
from autoprune.reporting.card import model_card
from autoprune.reporting.observer import Observer
from autoprune.searching import objective as objectives
from autoprune.searching.plan import Plan
from autoprune.searching.rows import Trial
from autoprune.searching.runs import (
    check_unchanged,
    read_config,
    read_trial,
    read_trials,
    read_winner,
)


@dataclass(frozen=True, eq=False)
class ExportReport:
    """An export that was written and verified.

    Attributes:
        folder: Where it is.
        target: Its export target.
        policy: What was exported.
        size_bytes: Of its weight files; as predicted, to the byte.
        metrics: What the policy scored on the report split.
        verified: What a fresh process found that loaded it again; None where there are
            no weights.
        notes: What the target made of the actions.
        usage: The lines that load it.
    """

    folder: Path
    target: str
    policy: Policy
    size_bytes: int
    metrics: Mapping[str, float]
    verified: Verification | None
    notes: Sequence[str] = ()
    usage: str = ""


def export(
    run_dir: str | Path,
    *,
    out: str | Path | None = None,
    trial: int | str | None = None,
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
        trial: Number of a trial; ``round-2/13`` of a further round.
        front: Export every trial that no other beats.
        target: Export target; the run's own by default.
        force: Replace exports that are there already.
        observer: Hears of stages.

    Raises:
        RunError: If the folder holds no run, or not what is asked for; or model, text
            or methods have changed since.
        ExportError: If an export cannot be written or fails its verification.
    """
    folder = Path(run_dir)
    observer = observer or Observer()
    config = read_config(folder)
    if trial is not None:
        read_trial(folder, trial)  # a wrong number is told before a model is loaded
    elif not front:
        read_winner(folder)
    observer.stage("loading model and text")
    plan = Plan.make(config, load_plugins(config.plugins))
    name = target or config.export
    plan.plugins.get("exporters", name)
    check_unchanged(folder, plan.fingerprint)
    found = _chosen(plan, folder, trial=trial, whole_front=front)
    reports = []
    for record, policy, bank in found:
        place = Path(out or folder / f"export-{name}")
        observer.stage(f"exporting trial {record['trial']} as {name}")
        reports.append(
            export_policy(
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


def export_policy(
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
    """Write one policy, and have a fresh process load and measure it.

    Args:
        bench: The model.
        bank: The variants that the policy was measured with.
        policy: The policy.
        place: The folder to write.
        target: Name of the export target.
        record: What joins the policy in ``policy.json``.
        plugins: Modules that the fresh process has to load as well.
        force: Replace an export that is there already.

    Raises:
        ExportError: If it cannot be written or fails its verification.
    """
    storages, exporter = bench.storages(policy), bench.exporters[target]
    check_free(place, force=force)
    check_target(bench, policy, target)
    measured, ids = bench.measure(policy, bank, "report"), bench.splits["report"].ids
    bounds, model = exporter.bounds(storages), bench.stitched.model
    with computing_in(model, torch.float32) if bounds.in_float32 else nullcontext():
        probe = Probe.take(bench.task, model, bench.tokenizer, ids)
    expected = Expected(
        task=bench.task.name,
        ids=ids.tolist(),
        perplexity=measured.metrics["perplexity"],
        size_bytes=exporter.size_bytes(storages, bench.untouched),
        probe=probe,
        bounds=bounds,
        compute_dtype=str(bench.compute_dtype).removeprefix("torch."),
    )
    dense = sizes_by_target(bench, bench.dense_policy())
    sizes = {
        name: {"dense": dense[name], "compressed": size}
        for name, size in sizes_by_target(bench, policy).items()
        if name in dense
    }
    verified = write_export(
        exporter,
        bench.job(policy, bank),
        place,
        policy=policy,
        tokenizer=bench.tokenizer,
        expected=expected,
        record={**record, "sizes": sizes, "splits": _splits(bench)},
        card=model_card,
        check=partial(verify_export, plugins=plugins),
        force=force,
    )
    return ExportReport(
        place.absolute(),
        target,
        policy,
        expected.size_bytes,
        measured.metrics,
        verified,
        exporter.notes(storages),
        exporter.usage(str(place.absolute()), bench.task.auto_class),
    )


def _splits(bench: Workbench) -> dict[str, str]:
    """Tell the fingerprint of every split of the text."""
    return {name: windows.fingerprint for name, windows in bench.splits.items()}


def _chosen(
    plan: Plan, folder: Path, *, trial: int | str | None, whole_front: bool
) -> list[tuple[dict[str, Any], Policy, VariantBank]]:
    """Find what to export: record, policy, and the bank that it was measured with."""
    named: list[tuple[int | str, Trial, Policy | None]]
    if whole_front:
        trials = objectives.front_in(read_trials(folder), plan.front_goals)
        if not trials:
            raise RunError(f"{folder} has no trial that keeps every limit, so no front")
        named = [(one.number, one, plan.reference) for one in trials]
    elif trial is not None:
        one, reference = read_trial(folder, trial)
        named = [(trial, one, reference or plan.reference)]
    else:
        winner = read_winner(folder)
        policy = Policy.from_dict(winner)
        return [(winner, policy, bank_of(plan.bench, winner))]
    found = []
    for name, one, reference in named:
        made = made_for(plan.bench, reference)
        bank = bank_of(plan.bench, one.policy.to_dict() | made)
        measured = plan.bench.measure(one.policy, bank, "report").metrics
        record = made | {
            "trial": name,
            "seed": plan.config.search.seed,
            "text": measured_on(plan.bench, plan.config.text, "report"),
            "figures": {
                "dense": plan.bench.dense_metrics("report"),
                "compressed": measured,
            },
        }
        found.append((record, one.policy, bank))
    return found
