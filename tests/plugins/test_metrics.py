"""The built-in metrics: which need the model, and which add up over layers."""

from autoprune_plugins.metrics import register_metrics
from tiny_scenes import evidence, tiny_scene

METRICS = {metric.name: metric for metric in register_metrics()}


def test_all_of_them_are_there() -> None:
    assert list(METRICS) == [
        "kl",
        "perplexity",
        "quality_drop",
        "size_bytes",
        "compression_ratio",
        "bits_per_weight",
        "sparsity",
        "model_sparsity",
        "gflop_per_token",
    ]


def test_those_that_add_up_need_no_model() -> None:
    scene = tiny_scene("llama")
    layer, storage = next(iter(scene.dense_storages.items()))
    priced = {
        name
        for name, metric in METRICS.items()
        if metric.price(layer, storage, scene) is not None
    }
    assert priced == {
        name for name, metric in METRICS.items() if not metric.needs_model
    }
    for name in priced:
        assert METRICS[name].measure(evidence(scene)) >= 0


def test_directions() -> None:
    largest = {n for n, metric in METRICS.items() if metric.direction == "maximize"}
    assert largest == {"compression_ratio", "sparsity", "model_sparsity"}
