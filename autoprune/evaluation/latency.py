"""What a policy takes in time: a metric for each workload, credited and predicted.

A search is credited with no more than is sure (``latency.estimate.credited``), layer by
layer, so that the metric adds up and a budget on it is kept exactly; the prediction for
the whole model, with its interval, stands beside it in reports.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from autoprune.compression.storage import Storage
from autoprune.evaluation.anatomy import (
    SIDE,
    Anatomy,
    channels_left,
    closes,
    linears_of,
)
from autoprune.evaluation.metric import Evidence, Metric, Scene
from autoprune.latency.device import Device
from autoprune.latency.estimate import Estimate, Term, credited
from autoprune.latency.predict import Forecast
from autoprune.latency.shape import of_attention, of_mlp
from autoprune.latency.workload import Workload
from autoprune.policy import Layer

PREFIX = "latency"
"""How the names of these metrics begin; ``latency_decode_ms``."""


def latency_metric_name(workload: str) -> str:
    """Name the metric of a workload.

    Example:
        >>> latency_metric_name("decode")
        'latency_decode_ms'
    """
    return f"{PREFIX}_{workload.replace('-', '_')}_ms"


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
        work, predictor = self.workload, self.device.predictor
        hidden, tokens = self.anatomy.hidden, work.batch * new
        numbers: tuple[tuple[str, int], ...] = ()
        if closes(layer, "heads"):
            left = self.anatomy.attention_left(layer, storage)
            if left is not None:
                yield predictor.attention(left, work.batch, new, context, work.dtype)
                numbers = of_attention(left, hidden)
        elif closes(layer, "channels") and storage.kept:
            numbers = of_mlp(channels_left(layer, storage), hidden)
        else:
            return
        for what, width in numbers:
            term = predictor.elementwise(what, width, tokens, work.dtype)
            if term is not None:
                yield term
        if storage.kept:
            rest = predictor.rest(hidden, tokens)
            yield replace(rest, us=rest.us * SIDE)


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
