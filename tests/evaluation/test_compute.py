"""Compute is that of the kept weights, as often as a token meets them."""

import pytest
import torch
from tiny_models import CONFIGS, tiny
from tiny_scenes import evidence, half, tiny_scene

from autoprune.evaluation.compute import GflopPerToken


def test_a_dense_model_by_hand() -> None:
    scene = tiny_scene("llama")
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32  # q, k and v, o
    mlp = 3 * 48 * 32
    head = 64 * 32  # the embedding itself is only looked up
    expected = 2 * (2 * (attention + mlp) + head) / 1e9
    assert GflopPerToken().measure(evidence(scene)) == pytest.approx(expected)


def test_a_tied_embedding_is_the_head() -> None:
    tied, untied = tiny_scene("qwen2"), tiny_scene("llama")
    assert tied.head_numel == 0
    metric = GflopPerToken()
    dense = metric.measure(evidence(tied))
    assert dense == pytest.approx(metric.measure(evidence(untied)))
    embedding = tied.layers[0]
    storages = {**tied.dense_storages}
    storages[embedding] = storages[embedding].masked(1000, "bitmap")
    saved = dense - metric.measure(evidence(tied, storages))
    assert saved == pytest.approx(2 * (64 * 32 - 1000) / 1e9)


def test_zeros_are_not_computed() -> None:
    scene = tiny_scene("llama")
    metric = GflopPerToken()
    head = 2 * 64 * 32 / 1e9
    dense, pruned = (metric.measure(evidence(scene, s)) for s in (None, half(scene)))
    assert pruned - head == pytest.approx((dense - head) / 2)


def test_experts_count_by_use() -> None:
    scene = tiny_scene("mixtral")
    attention = 2 * (2 * 32 * 32 + 2 * 16 * 32)
    chosen = 2 * 2 * 3 * 48 * 32  # 2 of 4 experts, in 2 blocks
    expected = 2 * (attention + chosen + 64 * 32) / 1e9
    assert GflopPerToken().measure(evidence(scene)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2", "opt", "bert"])
def test_it_is_what_torch_counts(kind: str) -> None:
    """Torch's counter sees all products; those of attention are left out of both."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(kind)
    length = 8
    ids = torch.randint(4, 60, (1, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(ids)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if op in ("aten.mm", "aten.addmm"))
    others = 0
    if kind == "opt":  # its word embeddings are widened and narrowed; no layers
        others = 2 * length * 2 * 16 * CONFIGS["opt"]["hidden_size"]
    if kind == "bert":  # the transform before its head is no layer either
        others = 2 * length * CONFIGS["bert"]["hidden_size"] ** 2
    found = GflopPerToken().measure(evidence(tiny_scene(kind)))
    assert found * 1e9 * length == pytest.approx(products - others)


def test_prices_add_up_to_the_measurement() -> None:
    for kind in ("qwen2", "mixtral"):
        scene = tiny_scene(kind)
        metric = GflopPerToken()
        prices = sum(metric.price(la, s, scene) for la, s in half(scene).items())
        value = metric.measure(evidence(scene, half(scene)))
        assert metric.total_limit(value, scene) == pytest.approx(prices)
