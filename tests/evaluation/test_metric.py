"""The scene knows the dense model; a metric without prices does not add up."""

from typing import ClassVar

from autoprune_plugins.metrics import register_metrics
from tiny_scenes import evidence, tiny_scene

from autoprune.compression.storage import Storage
from autoprune.evaluation.metric import Evidence, Metric


class Layers(Metric):
    name = "layers"
    direction = "minimize"
    help: ClassVar[str] = "number of layers"

    def measure(self, evidence: Evidence) -> float:
        return float(len(evidence.storages))


def test_a_metric_may_leave_prices_out() -> None:
    scene = tiny_scene("llama")
    metric = Layers()
    assert metric.measure(evidence(scene)) == 15
    layer, storage = next(iter(scene.dense_storages.items()))
    assert metric.price(layer, storage, scene) is None
    assert metric.total_limit(7.5, scene) == 7.5


def test_the_dense_model_is_known() -> None:
    scene = tiny_scene("llama")
    assert scene.dense_storages == {la: Storage.dense(la) for la in scene.layers}
    expected = scene.exporter.size_bytes(scene.dense_storages, scene.untouched)
    assert scene.dense_bytes == expected


def test_built_in_metrics_say_what_they_are() -> None:
    names = [metric.name for metric in register_metrics()]
    assert len(set(names)) == len(names)
    for metric in register_metrics():
        assert metric.direction in ("minimize", "maximize")
        assert metric.help
