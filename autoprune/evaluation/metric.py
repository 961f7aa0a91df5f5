"""What a metric is: the abstract base, and the evidence that it measures."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from jaxtyping import Int
from torch import Tensor

from autoprune.compression.storage import Part, Storage
from autoprune.evaluation.quality import Quality
from autoprune.exporting.exporter import Exporter
from autoprune.models.task import Task
from autoprune.policy import Layer

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True, eq=False)
class Scene:
    """What stays the same in all trials of a search.

    Attributes:
        layers: All layers of the inventory.
        untouched: Every other tensor that a plain checkpoint of the model holds.
        exporter: The export target, which decides size.
        head_numel: Weights of the output layer, for compute; 0 if it is one of the
            layers, as a tied embedding is.
        dense: Quality of the dense model on the same split; None before it is known.
    """

    layers: tuple[Layer, ...]
    untouched: Mapping[str, Part]
    exporter: Exporter
    head_numel: int
    dense: Quality | None = None

    @cached_property
    def dense_storages(self) -> dict[Layer, Storage]:
        """What the dense model stores."""
        return {layer: Storage.dense(layer) for layer in self.layers}

    @cached_property
    def block_numel(self) -> int:
        """Weights of the layers in blocks: what the field's ratios are shares of."""
        return sum(layer.numel for layer in self.layers if layer.block is not None)

    @cached_property
    def dense_bytes(self) -> int:
        """Exact size of the dense model in the same export target."""
        return self.exporter.size_bytes(self.dense_storages, self.untouched)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of one policy when its metrics are measured.

    Attributes:
        scene: What stays the same.
        storages: What each layer stores.
        quality: Its divergence and loss; None before the model has run.
        model: The model with the policy on it; None before that.
        tokenizer: The model's tokenizer.
        ids: The windows that it was measured on; None before that.
        task: What the model is for; None before that.
    """

    scene: Scene
    storages: Mapping[Layer, Storage]
    quality: Quality | None = None
    model: Any = None
    tokenizer: Any = None
    ids: Int[Tensor, "windows length"] | None = None
    task: Task | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """What one policy scored on one split.

    Attributes:
        metrics: Value of every metric, by name.
        quality: Divergence and loss, window by window; None if the model did not run.
        timings: Seconds spent in each part: ``put_s``, ``run_s``.
    """

    metrics: dict[str, float]
    quality: Quality | None
    timings: dict[str, float]


class Metric(ABC):
    """One number that tells something of a policy.

    Metrics that need no model are measured first and may reject a policy. One that adds
    up over layers says so with ``price``; a budget on it is then kept exactly.

    Attributes:
        name: Unique, lower case; names the unit where there is one.
        direction: Which way is better.
        needs_model: True if the model has to run.
        tasks: Names of the tasks that it belongs to; empty for all.
        help: What it is, with its unit, in one line.
    """

    name: str
    direction: Direction
    needs_model: ClassVar[bool] = False
    tasks: ClassVar[frozenset[str]] = frozenset()
    help: str

    @abstractmethod
    def measure(self, evidence: Evidence) -> float:
        """Measure a policy; NaN or inf if it has diverged."""

    def price(self, layer: Layer, storage: Storage, scene: Scene) -> float | None:
        """Price one layer, if the metric follows from a sum of prices; else None."""
        return None

    def total_limit(self, limit: float, scene: Scene) -> float:
        """Turn a limit on the metric into a largest sum of prices."""
        return limit


def metrics_of(task: str, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Give the metrics that a task has: those of all tasks, and its own."""
    fitting = {name: one for name, one in metrics.items() if not one.tasks}
    own = {name: one for name, one in metrics.items() if task in one.tasks}
    return fitting | own
