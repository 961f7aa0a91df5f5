"""Sizes are those of the written file, and prices keep budgets exactly."""

import math
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch
from tiny_exports import FORMS
from tiny_models import tiny
from tiny_scenes import evidence, half, scene_of, tiny_scene

from autoprune.compression.storage import Storage
from autoprune.evaluation.metric import Metric, Scene
from autoprune.evaluation.size import (
    BitsPerWeight,
    CompressionRatio,
    ModelSparsity,
    SizeBytes,
    Sparsity,
)
from autoprune.models.layers import read_weight
from autoprune.policy import Layer

METRICS = [
    SizeBytes(),
    CompressionRatio(),
    BitsPerWeight(),
    Sparsity(),
    ModelSparsity(),
]


def storages(scene: Scene, random: Random) -> dict[Layer, Storage]:
    """Draw a storage for every layer."""
    made = {}
    for layer, dense in scene.dense_storages.items():
        pruned = dense.masked(random.randrange(dense.numel), "bitmap")
        options = [dense, pruned, dense.quantized(4, 8, False), pruned]
        options.append(dense.masked(dense.numel // 2, "2:4").quantized(3, 8, True))
        made[layer] = random.choice(options)
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_size_is_that_of_the_file(kind: str, tmp_path: Path) -> None:
    model = tiny(kind).to(torch.bfloat16)
    scene, state = scene_of(model), model.state_dict()
    tensors = {name: state[name].contiguous() for name in scene.untouched}
    declared = {}
    for index, layer in enumerate(scene.layers):
        form = list(FORMS.values())[index % len(FORMS)]
        variant = form(read_weight(model, layer).contiguous())
        declared[layer] = variant.storage
        for name, part in variant.pack().items():
            tensors[f"{layer.name}.{name}"] = part
    path = tmp_path / "packed.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    found = SizeBytes().measure(evidence(scene, declared))
    assert found == path.stat().st_size
    ratio = CompressionRatio().measure(evidence(scene, declared))
    assert ratio == scene.dense_bytes / path.stat().st_size


def test_the_dense_model_in_numbers() -> None:
    scene = tiny_scene("qwen2")
    found = evidence(scene)
    assert CompressionRatio().measure(found) == 1.0
    assert BitsPerWeight().measure(found) == 32.0
    assert Sparsity().measure(found) == 0.0
    assert ModelSparsity().measure(found) == 0.0


def test_half_the_weights_in_numbers() -> None:
    scene = tiny_scene("llama")
    found = evidence(scene, half(scene))
    inside = sum(layer.numel for layer in scene.layers if layer.block is not None)
    layers = sum(layer.numel for layer in scene.layers)
    everything = layers + sum(part.numel for part in scene.untouched.values())
    assert Sparsity().measure(found) == 0.5  # the embedding is no layer of a block
    assert ModelSparsity().measure(found) == pytest.approx(inside / 2 / everything)
    assert BitsPerWeight().measure(found) == 17  # half of 32 bits, a bit of the mask


def total(metric: Metric, scene: Scene, chosen: dict[Layer, Storage]) -> float:
    prices = [metric.price(layer, storage, scene) for layer, storage in chosen.items()]
    return sum(price for price in prices if price is not None)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: str(metric.name))
def test_prices_within_a_limit_keep_the_limit(metric: Metric) -> None:
    """A policy whose prices just fit measures within the limit, and close to it."""
    scene, random = tiny_scene("llama"), Random(0)
    sign = 1 if metric.direction == "minimize" else -1
    slack = 0.04 if isinstance(metric, SizeBytes) else 1e-9  # headers of tiny tensors
    dense = metric.measure(evidence(scene))
    for _ in range(50):
        chosen = storages(scene, random)
        value = metric.measure(evidence(scene, chosen))
        prices = total(metric, scene, chosen)
        # The limit at which these prices would just be allowed, found by halving.
        low, high = sorted((value * 0.5, value * 2 + 1e-6))
        for _ in range(80):
            middle = (low + high) / 2
            fits = metric.total_limit(middle, scene) >= prices
            if fits == (sign > 0):
                high = middle
            else:
                low = middle
        limit = high if sign > 0 else low
        assert sign * value <= sign * limit + 1e-9
        assert abs(value - limit) <= slack * max(abs(value), abs(dense)) + 1e-9


def test_a_ratio_of_nothing_is_no_limit() -> None:
    scene = tiny_scene("llama")
    assert CompressionRatio().total_limit(0.0, scene) == math.inf
