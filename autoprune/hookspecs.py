"""Every hook of AutoPrune, on one screen.

A plugin is a module with functions of these names, marked ``@autoprune.hookimpl`` and
named by an entry point of the group ``autoprune``. ``register_*`` hooks return lists of
ready objects, each with a unique lower-case ``name``.
"""

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from autoprune.evaluation.workbench import Workbench
    from autoprune.policy import Policy
    from autoprune.searching.problem import Problem

PROJECT = "autoprune"
"""Name of the plugin manager and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_tasks() -> "Sequence[Any]":
    """Return ``Task`` objects: causal language modelling, masked language modelling."""


@hookspec
def register_methods() -> "Sequence[Any]":
    """Return ``CompressionMethod`` objects: pruning, quantization, joint."""


@hookspec
def register_samplers() -> "Sequence[Any]":
    """Return ``SamplerFactory`` objects, which make Optuna samplers."""


@hookspec
def register_metrics() -> "Sequence[Any]":
    """Return ``Metric`` objects."""


@hookspec
def register_rewards() -> "Sequence[Any]":
    """Return ``Reward`` objects, which make one number of a measurement."""


@hookspec
def register_text_sources() -> "Sequence[Any]":
    """Return ``TextSource`` objects: built-in text, files, hub data sets."""


@hookspec
def register_architectures() -> "Sequence[Any]":
    """Return ``Architecture`` objects: where a model family's blocks and sites are."""


@hookspec
def register_layer_kinds() -> "Sequence[Any]":
    """Return ``LayerKind`` objects: how modules of a class hold a layer."""


@hookspec
def register_exporters() -> "Sequence[Any]":
    """Return ``Exporter`` objects: formats in which a compressed model is written."""


@hookspec
def register_latency_backends() -> "Sequence[Any]":
    """Return ``LatencyBackend`` objects, which open devices that times are told of."""


@hookspec
def register_schedules() -> "Sequence[Any]":
    """Return ``Schedule`` objects: one-shot, gradual, iterative, with rewinding."""


@hookspec
def register_recoveries() -> "Sequence[Any]":
    """Return ``RecoveryMethod`` objects: fine-tuning, adapters, block by block."""


@hookspec
def register_formulas() -> "Sequence[Any]":
    """Return ``Proposer`` objects: a ``Formula`` divides zeros among layers."""


@hookspec
def propose_policies(
    problem: "Problem", bench: "Workbench"
) -> "Sequence[tuple[str, Policy]]":
    """Return policies to try first, each after the name of its origin."""


@hookspec
def trial_finished(trial: Any, run_dir: "Path") -> None:
    """Observe a trial, after its row is on disk."""


HOOKS: "tuple[Callable[..., Any], ...]" = (
    register_tasks,
    register_methods,
    register_samplers,
    register_metrics,
    register_rewards,
    register_text_sources,
    register_architectures,
    register_layer_kinds,
    register_exporters,
    register_latency_backends,
    register_schedules,
    register_recoveries,
    register_formulas,
    propose_policies,
    trial_finished,
)
