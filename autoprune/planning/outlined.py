"""A workbench around a model without its weights: spaces and sizes, nothing more."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.storage import untouched_parts
from autoprune.compression.store import VariantStore, cap_bytes
from autoprune.config import RunConfig
from autoprune.evaluation.timed import with_latency
from autoprune.evaluation.workbench import Workbench
from autoprune.exporting.sharded import sharded
from autoprune.models.checkpoints import Checkpoint, cache_dir
from autoprune.models.layers import inventory
from autoprune.models.outline import outline
from autoprune.models.task import Task, output_layer
from autoprune.plugins import Plugins
from autoprune.searching.formulate import check_export, formulate, goals_of
from autoprune.searching.objective import Objective
from autoprune.searching.problem import Problem
from autoprune.searching.strategies import DEFAULTS, SamplerFactory, strategy_of


@dataclass(frozen=True, eq=False)
class Outlined:
    """A run that may be, as far as it is known without weights and text.

    Attributes:
        config: What is asked for.
        plugins: What is installed.
        bench: The model's layers and sizes; nothing can be measured on it.
        problem: What may be chosen, and the budgets.
        strategy: How it would be searched.
        hidden: Width of the hidden state.
        vocabulary: Rows of the head.
    """

    config: RunConfig
    plugins: Plugins
    bench: Workbench
    problem: Problem
    strategy: SamplerFactory
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, config: RunConfig, plugins: Plugins) -> "Outlined":
        """Read a model's configuration and cross its sites with the space.

        Raises:
            ModelError: If there is no such model.
            ConfigError: If the configuration is wrong or no policy meets the budgets.
        """
        check_export(plugins.get("exporters", config.export), fuse=config.fuse)
        task: Task = plugins.get("tasks", config.task)
        plugins.get("samplers", config.search.sampler or DEFAULTS[0])
        model = outline(config.model, task.auto_class)
        bench = _bench(config, plugins, model, task)
        if config.latency:
            backends = plugins.objects["latency_backends"].values()
            bench = with_latency(bench, config.latency, backends)
        problem = formulate(bench, config.space, config.objective.budgets)
        directions = {name: one.direction for name, one in bench.metrics.items()}
        objective = Objective(goals_of(directions, config.objective))
        strategy = strategy_of(config.search.sampler, plugins, objective, problem)
        text: Any = model.config.get_text_config()
        rows = output_layer(model).weight.shape[0]
        return cls(
            config, plugins, bench, problem, strategy, int(text.hidden_size), int(rows)
        )


def _bench(config: RunConfig, plugins: Plugins, model: Any, task: Task) -> Workbench:
    found = inventory(model, list(plugins.objects["architectures"].values()))
    found = found if config.fuse else found.unfused()
    untouched = untouched_parts(model, found)
    targets = plugins.objects["exporters"]
    own = {config.export: targets[config.export]}
    known = sharded(own, model, found, config.tensor_parallel)
    source = getattr(model.config, "name_or_path", "") or config.model
    return Workbench(
        Checkpoint(config.model, Path(source), "outline"),
        task,
        None,
        found,
        StitchedModel(model, found.layers),
        Actions(plugins.methods),
        known[config.export],
        known,
        plugins.objects["metrics"],
        {},
        _store(config),
        untouched,
    )


def _store(config: RunConfig) -> VariantStore:
    """Give the store that the run would use, for its cap."""
    return VariantStore(
        cache_dir() / "variants", int(config.search.disk or cap_bytes())
    )
