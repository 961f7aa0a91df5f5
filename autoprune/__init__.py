"""AutoPrune searches for the best way to compress a transformer.

Names are imported when they are first asked for, so that ``import autoprune`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.advising import advise
    from autoprune.compression.method import CompressionMethod, Parameter, Source
    from autoprune.compression.storage import Storage
    from autoprune.compression.variant import Variant
    from autoprune.config import RunConfig
    from autoprune.deliver import export
    from autoprune.errors import (
        AutoPruneError,
        BudgetError,
        ConfigError,
        ExportError,
        MethodError,
        ModelError,
        PluginError,
        PolicyError,
        ProfileError,
        RunError,
        StoreError,
        TextError,
    )
    from autoprune.evaluation.metric import Metric
    from autoprune.evaluation.reward import Reward
    from autoprune.exporting.exporter import Exporter
    from autoprune.exporting.verification import verify
    from autoprune.hookspecs import hookimpl
    from autoprune.latency.device import Device, LatencyBackend
    from autoprune.models.layers import Architecture
    from autoprune.models.statistics import InputStatistics
    from autoprune.models.task import Task
    from autoprune.models.text import TextSource
    from autoprune.plugins import load_plugins
    from autoprune.policy import Action, Layer, Policy, Site
    from autoprune.proving import prove
    from autoprune.run import search
    from autoprune.searching.formulas import Formula, Ladder
    from autoprune.searching.proposer import Proposer
    from autoprune.searching.strategies import Brief, PolicySampler, SamplerFactory
    from autoprune.serving import load
    from autoprune.training.recovery import Pupil, RecoveryMethod
    from autoprune.training.schedule import Outline, Phase, Schedule
    from autoprune.transfer import apply, evaluate

    __version__: str

__all__ = [
    "Action",
    "Architecture",
    "AutoPruneError",
    "Brief",
    "BudgetError",
    "CompressionMethod",
    "ConfigError",
    "Device",
    "ExportError",
    "Exporter",
    "Formula",
    "InputStatistics",
    "Ladder",
    "LatencyBackend",
    "Layer",
    "MethodError",
    "Metric",
    "ModelError",
    "Outline",
    "Parameter",
    "Phase",
    "PluginError",
    "Policy",
    "PolicyError",
    "PolicySampler",
    "ProfileError",
    "Proposer",
    "Pupil",
    "RecoveryMethod",
    "Reward",
    "RunConfig",
    "RunError",
    "SamplerFactory",
    "Schedule",
    "Site",
    "Source",
    "Storage",
    "StoreError",
    "Task",
    "TextError",
    "TextSource",
    "Variant",
    "__version__",
    "advise",
    "apply",
    "evaluate",
    "export",
    "hookimpl",
    "load",
    "load_plugins",
    "prove",
    "search",
    "verify",
]

_HOMES = {
    "advising": ("advise",),
    "compression.method": ("CompressionMethod", "Parameter", "Source"),
    "compression.storage": ("Storage",),
    "compression.variant": ("Variant",),
    "config": ("RunConfig",),
    "deliver": ("export",),
    "exporting.verification": ("verify",),
    "transfer": ("apply", "evaluate"),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "evaluation.metric": ("Metric",),
    "evaluation.reward": ("Reward",),
    "exporting.exporter": ("Exporter",),
    "hookspecs": ("hookimpl",),
    "latency.device": ("Device", "LatencyBackend"),
    "models.layers": ("Architecture",),
    "models.statistics": ("InputStatistics",),
    "models.task": ("Task",),
    "models.text": ("TextSource",),
    "plugins": ("load_plugins",),
    "policy": ("Action", "Layer", "Policy", "Site"),
    "proving": ("prove",),
    "run": ("search",),
    "serving": ("load",),
    "searching.formulas": ("Formula", "Ladder"),
    "searching.proposer": ("Proposer",),
    "training.recovery": ("Pupil", "RecoveryMethod"),
    "training.schedule": ("Outline", "Phase", "Schedule"),
    "searching.strategies": ("Brief", "PolicySampler", "SamplerFactory"),
}
"""Where the public names are defined."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name == "__version__":
        return import_module("importlib.metadata").version("autoprune")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"autoprune.{home}"), name)
    raise AttributeError(f"module 'autoprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
