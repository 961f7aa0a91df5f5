"""What a policy takes in time: a metric for each workload, credited and predicted.

A search is credited with no more than is sure (``latency.estimate.credited``), layer by
layer, so that the metric adds up and a budget on it is kept exactly; the prediction for
the whole model, with its interval, stands beside it in reports.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from autoprune.compression.formats import INTEGERS
from autoprune.compression.storage import Storage
from autoprune.evaluation.metric import Evidence, Metric, Scene
from autoprune.latency.device import Device
from autoprune.latency.estimate import Estimate, Term, credited
from autoprune.latency.predict import Forecast
from autoprune.latency.shape import (
    DENSE,
    SPARSE,
    Attention,
    Block,
    Linear,
    ModelShape,
)
from autoprune.latency.workload import Workload
from autoprune.models.layers import Inventory
from autoprune.policy import Layer

PREFIX = "latency"
"""How the names of these metrics begin; ``latency_decode_ms``."""

_SIDE = 0.5
"""Share of a block's other work that belongs to its attention; the rest to its MLP."""


def latency_metric_name(workload: str) -> str:
    """Name the metric of a workload.

    Example:
        >>> latency_metric_name("decode")
        'latency_decode_ms'
    """
    return f"{PREFIX}_{workload.replace('-', '_')}_ms"


def format_of(storage: Storage) -> str:
    """Say what a weight can be multiplied as: what a kernel would see of its storage.

    Zeros count only where any four weights in a row have two of them at most, in the
    layer's own order of columns; scales count only where a kernel knows their place.
    """
    form = DENSE
    if storage.bits is not None:
        whole = storage.code == INTEGERS and not storage.channel_scales
        if storage.code.startswith("fp8_e4m3") and storage.group is None:
            form = "fp8-tensor" if storage.code.endswith("tensor") else "fp8-row"
        elif storage.bits == 8 and storage.code == INTEGERS and storage.symmetric:
            form = "int8" if storage.group is None else f"int8-g{storage.group}"
        elif whole:
            rows = f"-g{storage.group}" if storage.group else ""
            form = f"int{storage.bits}{rows}"
        else:
            form = storage.code
    if not _is_two_of_four(storage):
        return form
    return SPARSE if form == DENSE else f"{SPARSE}+{form}"


def linears_of(layer: Layer, storage: Storage) -> tuple[Linear, ...]:
    """Say which products a layer is made of: none where nothing is left of it."""
    n, k = layer.shape
    if storage.units is not None and layer.cut is not None:
        left = storage.units * layer.cut.unit
        n, k = (left, k) if layer.cut.axis == "rows" else (n, left)
    if storage.hidden is not None and layer.hidden is not None:
        rows = layer.hidden.axis == "rows"
        n, k = (storage.hidden, k) if rows else (n, storage.hidden)
    found = []
    if storage.kept:
        found.append(Linear(layer.name, n, k, format_of(storage), layer.uses))
    if rank := storage.low_rank:
        inner = Linear(f"{layer.name}.low_rank_b", rank, k, DENSE, layer.uses)
        outer = Linear(f"{layer.name}.low_rank_a", n, rank, DENSE, layer.uses)
        found += [inner, outer]
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What time depends on beside the layers.

    Attributes:
        inventory: The layers.
        hidden: Width of the hidden state.
        attention: Of a dense block; None where the configuration does not tell.
        head: The output layer where it is none of the layers; None else.
    """

    inventory: Inventory
    hidden: int
    attention: Attention | None
    head: Linear | None

    @classmethod
    def of(cls, config: Any, inventory: Inventory, *, vocabulary: int) -> "Anatomy":
        """Read it off a model's configuration.

        Args:
            config: The model's configuration.
            inventory: Its layers.
            vocabulary: Rows of the output layer.
        """
        text = config.get_text_config()
        hidden = int(text.hidden_size)
        heads = getattr(text, "num_attention_heads", None)
        attention = None
        if heads:
            kv_heads = getattr(text, "num_key_value_heads", None) or heads
            dim = getattr(text, "head_dim", None) or hidden // heads
            attention = Attention(heads, kv_heads, dim)
        looked_up = inventory.tied and any(la.input is None for la in inventory.layers)
        head = None if looked_up else Linear("head", vocabulary, hidden)
        return cls(inventory, hidden, attention, head)

    def shape(self, storages: Mapping[Layer, Storage]) -> ModelShape:
        """Give the shape of the model under a policy."""
        blocks: list[list[Layer]] = [[] for _ in self.inventory.blocks]
        head = self.head
        for layer, storage in storages.items():
            if layer.block is not None:
                blocks[layer.block].append(layer)
            elif layer.input is None and head is None:  # the embedding is the head
                head = replace(self._as_head(layer, storage), name="head")
        made = (self._block(layers, storages) for layers in blocks)
        return ModelShape(tuple(made), head, self.hidden)

    def _as_head(self, layer: Layer, storage: Storage) -> Linear:
        return next(iter(linears_of(layer, storage)), Linear("head", *layer.shape))

    def _block(
        self, layers: Sequence[Layer], storages: Mapping[Layer, Storage]
    ) -> Block:
        attention, gone = self.attention, set[str]()
        for layer in layers:
            storage = storages[layer]
            if _closes(layer, "heads"):
                attention = self.attention_left(layer, storage)
            if layer.cut is not None and layer.cut.axis == "columns":
                gone |= set() if storage.kept else {layer.cut.kind}
        linears = (one for la in layers for one in linears_of(la, storages[la]))
        return Block(tuple(linears), attention, 1.0 - _SIDE * len(gone))

    def attention_left(self, layer: Layer, storage: Storage) -> Attention | None:
        """Say what is left of an attention, from the layer that takes its heads."""
        if self.attention is None or not storage.kept:
            return None
        if storage.units is None or layer.cut is None:
            return self.attention
        share = storage.units / layer.cut.units
        whole = self.attention
        heads, kv_heads = round(whole.heads * share), round(whole.kv_heads * share)
        return replace(whole, heads=heads, kv_heads=max(kv_heads, 1))


class LatencyMs(Metric):
    """Milliseconds that a workload is credited with on a device.

    Args:
        device: The device.
        workload: The workload.
        anatomy: Of the model.
    """

    direction = "minimize"

    def __init__(self, device: Device, workload: Workload, anatomy: Anatomy) -> None:
        self.name = latency_metric_name(workload.name)
        self.help = (
            f"milliseconds of {workload.batch} x {workload.prompt} tokens in and "
            f"{workload.output} out on {device.name}, as far as surely gained"
        )
        self.device, self.workload, self.anatomy = device, workload, anatomy
        self._prices: dict[tuple[Layer, Storage], float] = {}

    def measure(self, evidence: Evidence) -> float:
        """Add up what every layer is credited with, and what no choice changes."""
        scene = evidence.scene
        layers = sum(self.price(la, s, scene) for la, s in evidence.storages.items())
        return self._unchanged + layers

    def price(self, layer: Layer, storage: Storage, scene: Scene) -> float:
        """Price a layer: its products, and its share of what its block does beside."""
        key = (layer, storage)
        if key not in self._prices:
            changed = self._estimate(layer, storage)
            dense = self._estimate(layer, Storage.dense(layer))
            self._prices[key] = credited(changed, dense)
        return self._prices[key]

    def total_limit(self, limit: float, scene: Scene) -> float:
        """Take off what no choice changes."""
        return limit - self._unchanged

    def forecast(self, storages: Mapping[Layer, Storage]) -> Forecast:
        """Predict a policy as a whole, with an interval."""
        return self.device.predictor.forecast(
            self.anatomy.shape(storages), self.workload
        )

    @cached_property
    def _unchanged(self) -> float:
        dense = {la: Storage.dense(la) for la in self.anatomy.inventory.layers}
        whole = self.forecast(dense).total.ms
        return whole - sum(self._estimate(la, s).ms for la, s in dense.items())

    def _estimate(self, layer: Layer, storage: Storage) -> Estimate:
        """Predict what a layer takes over the whole workload."""
        work, found = self.workload, dict[Term, float]()
        looked_up = layer.block is None and layer.input is None
        if looked_up and self.anatomy.head is not None:
            return Estimate({})
        for times, new, context in _steps(work):
            # A head reads the last token of each sequence; blocks read all.
            tokens = work.batch * (1 if looked_up else new)
            terms = [
                self.device.predictor.linear(linear, tokens, work.dtype)
                for linear in linears_of(layer, storage)
            ]
            terms += self._beside(layer, storage, new, context)
            for term in terms:
                found[term] = found.get(term, 0.0) + times
        return Estimate(found)

    def _beside(
        self, layer: Layer, storage: Storage, new: int, context: int
    ) -> Iterator[Term]:
        """Give what goes with a layer: the attention, and half of a block's rest."""
        work = self.workload
        if _closes(layer, "heads"):
            left = self.anatomy.attention_left(layer, storage)
            if left is not None:
                yield self.device.predictor.attention(
                    left, work.batch, new, context, work.dtype
                )
        ends = _closes(layer, "heads") or _closes(layer, "channels")
        if ends and storage.kept:
            rest = self.device.predictor.rest(self.anatomy.hidden, work.batch * new)
            yield replace(rest, us=rest.us * _SIDE)


def latency_metrics(
    device: Device, workloads: Sequence[Workload], anatomy: Anatomy
) -> dict[str, Metric]:
    """Make the metrics of some workloads on one device, by name."""
    made = [LatencyMs(device, work, anatomy) for work in workloads]
    return {metric.name: metric for metric in made}


def _steps(work: Workload) -> Iterator[tuple[float, int, int]]:
    """Give the steps of a workload: how often, new tokens, tokens attended to."""
    yield 1.0, work.prompt, work.prompt
    contexts = work.decode_contexts
    for context in contexts:
        if work.output > 1:
            yield (work.output - 1) / len(contexts), 1, context


def _closes(layer: Layer, kind: str) -> bool:
    """Tell whether a layer takes what its structure makes: an ``o`` or a ``down``."""
    cut = layer.cut
    return cut is not None and cut.kind == kind and cut.axis == "columns"


def _is_two_of_four(storage: Storage) -> bool:
    """Tell whether a mask keeps at most two of any four weights in a row."""
    if storage.mask is None or ":" not in storage.mask or storage.permuted:
        return False
    keep, of = (int(number) for number in storage.mask.split(":"))
    return keep * 2 <= of and of in (2, 4)
