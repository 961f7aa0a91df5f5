"""Takes policies to other models: applies them there, and measures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autoprune.adapting import adapted
from autoprune.compression.reusing import refuse_gradients
from autoprune.config import TextConfig
from autoprune.deliver import ExportReport, export_policy
from autoprune.errors import ConfigError, PolicyError, unknown_name
from autoprune.evaluation.origin import ANEW, Origin
from autoprune.evaluation.provenance import made_for, measured_on
from autoprune.evaluation.scheduled import course_of, own_bank
from autoprune.evaluation.targets import check_target
from autoprune.evaluation.workbench import Workbench
from autoprune.exporting.folder import POLICY_FILE
from autoprune.exporting.fresh_process import measure
from autoprune.exporting.marker import MARKER
from autoprune.models.checkpoints import Checkpoint
from autoprune.models.task import Task
from autoprune.plugins import Plugins, load_plugins
from autoprune.policy import ONE_SHOT, Policy
from autoprune.policy_files import read_policy, read_record, task_of
from autoprune.reporting.observer import Observer

STATISTICS = ("anew", "reuse")
"""Whose statistics variants are made from: the model's own, or the original's."""

SEED = 0
"""Decides which documents go to which split, where no run says so."""


def apply(
    policy: str | Path | Policy,
    *,
    model: str,
    out: str | Path,
    target: str = "packed",
    task: str | None = None,
    text: TextConfig | None = None,
    schedule: str | None = None,
    adapt: bool = False,
    statistics: str = STATISTICS[0],
    tensor_parallel: int = 1,
    force: bool = False,
    plugins: Sequence[str] = (),
    observer: Observer | None = None,
) -> ExportReport:
    """Compress another checkpoint by a policy, and export it.

    Statistics are taken anew from that model, block by block, on the inputs that its
    own compressed blocks give. Or those of the model that the policy was made on are
    reused, from the same text, reference and seed: a sibling that was tuned from it is
    then compressed by what the search had decided on, and no text is run through the
    sibling itself but to measure it. They are gathered once more, as a file of them
    would be larger than the model, so it takes as long, and the memory of both models.

    Args:
        policy: A policy, or the path of a ``policy.json``, or of its folder.
        model: Folder, hub id, GGUF file or ``demo``.
        out: Folder to write.
        target: Export target.
        task: What the model is for; by default what the policy was made for.
        text: Which text to take statistics from, anew, to train and to measure on.
        schedule: How the policy is applied, in the place of its own schedule:
            ``iterative(rounds=3) + distill(tokens=65536)``.
        adapt: Take the policy to a model of another depth, by relative depth and type
            of site; else the model has to have the same sites.
        statistics: ``anew`` or ``reuse``.
        tensor_parallel: GPUs that have to share every layer of the export.
        force: Replace an export that is there already.
        plugins: Modules to load beside the installed plugins.
        observer: Hears of stages.

    Raises:
        ConfigError: If ``statistics`` is neither; or the schedule trains, but no text
            is set aside for it.
        PolicyError: If the policy does not fit the model, or its statistics cannot be
            reused: its model is gone, has changed or has other layers.
        MethodError: If statistics are reused and a method reads gradients.
        ExportError: If the export cannot be written or fails its verification.
    """
    observer = observer or Observer()
    record = _reused_record(policy, statistics, adapt=adapt)
    chosen = policy if isinstance(policy, Policy) else read_policy(policy)
    task = task or task_of(policy)
    text = text or TextConfig()
    observer.stage("loading model and text")
    bench = _open(load_plugins(plugins), model, task, text, target, tensor_parallel)
    if adapt:
        chosen = adapted(chosen, bench.inventory)
    chosen = bench.actions.canonical_policy(chosen)
    if schedule is not None:
        chosen = replace(chosen, schedule=course_of(bench, schedule).text)
    check_target(bench, chosen, target)  # what does not fit is refused before any work
    if record is None:
        bank, made = own_bank(bench, chosen), made_for(bench, chosen)
    elif chosen.schedule != ONE_SHOT:
        raise PolicyError(
            f"the schedule {chosen.schedule!r} takes statistics of what it has trained:"
            f" they cannot be reused. {ANEW}"
        )
    else:
        refuse_gradients(bench.actions, bench.per_layer(chosen).items())
        observer.stage("loading the model whose statistics are reused")
        origin = Origin.open(load_plugins(plugins), record, target=target)
        bank, made = origin.bank_for(bench), origin.record_for(bench)
    observer.stage(_making(chosen))
    bank.make(bench.per_layer(chosen).items(), observer.advance)
    observer.stage("measuring on the report split")
    record = made | {
        "seed": SEED,
        "text": measured_on(bench, text, "report"),
        "figures": {
            "dense": bench.dense_metrics("report"),
            "compressed": bench.measure(chosen, bank, "report").metrics,
        },
    }
    observer.stage(f"exporting as {target}")
    return export_policy(
        bench,
        bank,
        chosen,
        place=Path(out),
        target=target,
        record=record,
        plugins=plugins,
        force=force,
    )


def evaluate(
    model: str,
    *,
    policy: str | Path | Policy | None = None,
    task: str | None = None,
    text: TextConfig | None = None,
    target: str = "packed",
    plugins: Sequence[str] = (),
    observer: Observer | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a model on the report split, and a policy on it; or an export.

    Args:
        model: Folder, hub id, GGUF file or ``demo``; or the folder of an export.
        policy: A policy, or the path of a ``policy.json``; its variants are made on
            the inputs that its own compressed blocks give.
        task: What the model is for; by default what the policy was made for.
        text: Which text; for an export by default the one it was measured on.
        target: Export target, for sizes.
        plugins: Modules to load beside the installed plugins.
        observer: Hears of stages.

    Returns:
        Metrics of ``dense``, and of ``policy`` if one is given; of an export those
        that it has by itself, as ``export``.

    Raises:
        PolicyError: If the policy does not fit the model.
        ExportError: If an export does not load.
    """
    observer = observer or Observer()
    observer.stage("loading model and text")
    if (Path(model) / MARKER).is_file():
        if policy is not None:
            raise PolicyError(
                f"{model} is an export, which has its policy already; put {policy} on "
                "the dense model"
            )
        task = task or task_of(Path(model) / POLICY_FILE)
        return {"export": _measure_export(Path(model), task, text, plugins)}
    task = task or task_of(policy)
    bench = _open(load_plugins(plugins), model, task, text or TextConfig(), target)
    observer.stage("measuring the dense model")
    found = {"dense": bench.dense_metrics("report")}
    if policy is not None:
        chosen = policy if isinstance(policy, Policy) else read_policy(policy)
        chosen = bench.actions.canonical_policy(chosen)
        bank = own_bank(bench, chosen)
        observer.stage(_making(chosen))
        bank.make(bench.per_layer(chosen).items(), observer.advance)
        observer.stage("measuring the policy")
        found["policy"] = bench.measure(chosen, bank, "report").metrics
    return found


def _making(policy: Policy) -> str:
    """Name the stage in which variants are made."""
    return (
        "making variants"
        if policy.schedule == ONE_SHOT
        else f"carrying out {policy.schedule}"
    )


def _reused_record(
    policy: str | Path | Policy, statistics: str, *, adapt: bool
) -> Mapping[str, Any] | None:
    """Read whose statistics are to be reused; None if they are taken anew.

    Raises:
        ConfigError: If ``statistics`` is not one of ``STATISTICS``.
        PolicyError: If nothing says whose, or the model will have another depth.
    """
    if statistics not in STATISTICS:
        raise ConfigError(unknown_name("way of statistics", statistics, STATISTICS))
    if statistics == "anew":
        return None
    if adapt:
        raise PolicyError(
            "statistics are of single layers, and a model of another depth has other "
            "ones: take them anew, or do not adapt the policy"
        )
    if isinstance(policy, Policy):
        raise PolicyError(
            "a policy by itself does not say whose statistics to reuse. Give the path "
            "of a policy.json, or take statistics anew"
        )
    read_policy(policy)  # refuses what is no policy
    return read_record(policy)


def _measure_export(
    folder: Path, task: str, text: TextConfig | None, plugins: Sequence[str]
) -> dict[str, float]:
    """Load an export and measure it, by default on the tokens of its own figures."""
    read_policy(folder / POLICY_FILE)  # refuses a damaged file by name
    record = json.loads((folder / POLICY_FILE).read_text(encoding="utf-8"))
    if text is None:
        named = record.get("text", {})
        text = TextConfig(
            **{k: named[k] for k in TextConfig.model_fields if k in named}
        )
    loaded = load_plugins(plugins)
    kind: Task = loaded.get("tasks", task)
    splits = kind.load_splits(
        text.source,
        loaded.objects["text_sources"],
        kind.load_tokenizer(Checkpoint(str(folder), folder, "")),
        length=text.window,
        windows=text.windows,
        seed=record.get("seed", SEED),
    )
    found = measure(
        {
            "folder": str(folder),
            "ids": splits["report"].ids.tolist(),
            "task": task,
            "dtype": None,
            "batch": 8,
            "plugins": list(plugins),
            "threads": torch.get_num_threads(),
        }
    )
    return {name: found[name] for name in ("perplexity", "size_bytes")}


def _open(
    plugins: Plugins,
    model: str,
    task: str,
    text: TextConfig,
    target: str,
    ways: int = 1,
) -> Workbench:
    return Workbench.open(
        plugins,
        model=model,
        task=task,
        text=text,
        target=target,
        seed=SEED,
        tensor_parallel=ways,
    )
