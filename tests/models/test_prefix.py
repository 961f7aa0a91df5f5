"""Blocks that answer from memory change nothing but the time."""

from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import CONFIGS, tiny
from torch import Tensor, nn

from autoprune.models.layers import Inventory, inventory
from autoprune.models.prefix import Prefix
from autoprune.models.weights import read_weight, write_weight
from autoprune.policy import Layer

BLOCKS = 3


def model_of(kind: str) -> tuple[Any, Inventory]:
    names = {"n_layer"} if kind == "gpt2" else {"num_hidden_layers"}
    changes: dict[str, Any] = dict.fromkeys(names, BLOCKS)
    if "layer_types" in CONFIGS[kind]:
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
        changes["layer_types"] = changes["layer_types"][:BLOCKS]
    model = tiny(kind, **changes)
    return model, inventory(model, register_architectures())


@pytest.fixture
def ids(rng: torch.Generator) -> Tensor:
    return torch.randint(4, 60, (2, 12), generator=rng)


def change(model: nn.Module, layer: Layer) -> None:
    write_weight(model, layer, read_weight(model, layer) * 1.5)


def count_runs(model: nn.Module, found: Inventory) -> list[int]:
    """Count how often the first matrix of each block is used."""
    runs = [0] * len(found.blocks)

    def add(block: int) -> Any:
        def hook(*_: Any) -> None:
            runs[block] += 1

        return hook

    for block in range(len(found.blocks)):
        first = next(la for la in found.layers if la.block == block and la.input)
        model.get_submodule(first.name).register_forward_pre_hook(add(block))
    return runs


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bert", "opt", "mixtral"])
def test_reuse_gives_the_same_bits_and_spares_blocks(kind: str, ids: Tensor) -> None:
    model, found = model_of(kind)
    runs = count_runs(model, found)
    prefix = Prefix(found)
    names: dict[Layer, str] = dict.fromkeys(found.layers, "dense")
    prefix.move(names)
    with torch.inference_mode():
        whole = model(ids).logits
        with prefix.reused(model, "batch", BLOCKS) as skipped:
            assert skipped == 0
            assert torch.equal(model(ids).logits, whole)
        with prefix.reused(model, "batch", BLOCKS) as skipped:
            assert skipped == BLOCKS
            assert torch.equal(model(ids).logits, whole)
        assert runs == [2] * BLOCKS
        for block in reversed(range(BLOCKS)):
            layer = next(la for la in found.layers if la.block == block and la.input)
            before = read_weight(model, layer).clone()
            change(model, layer)
            expected = model(ids).logits
            assert not torch.equal(expected, whole)
            unchanged = prefix.unchanged(names | {layer: "other"})
            runs[:] = [0] * BLOCKS
            with prefix.reused(model, "batch", unchanged) as skipped:
                assert skipped == unchanged == block
                assert torch.equal(model(ids).logits, expected)
            assert runs == [0] * block + [1] * (BLOCKS - block)
            write_weight(model, layer, before)
        assert torch.equal(model(ids).logits, whole)


def test_an_embedding_comes_before_every_block(ids: Tensor) -> None:
    _, found = model_of("llama")
    prefix = Prefix(found)
    names: dict[Layer, str] = dict.fromkeys(found.layers, "dense")
    assert prefix.unchanged(names) == 0  # there is no anchor yet
    prefix.move(names)
    embedding = next(la for la in found.layers if la.block is None)
    assert prefix.unchanged(names) == BLOCKS
    assert prefix.unchanged(names | {embedding: "other"}) == 0


def test_a_new_anchor_keeps_what_it_shares(ids: Tensor) -> None:
    model, found = model_of("llama")
    prefix = Prefix(found)
    names: dict[Layer, str] = dict.fromkeys(found.layers, "dense")
    prefix.move(names)
    with torch.inference_mode():
        with prefix.reused(model, "batch", BLOCKS):
            model(ids)
        held = prefix.held_bytes
        layer = next(la for la in found.layers if la.block == 2)
        change(model, layer)
        expected = model(ids).logits
        moved = names | {layer: "other"}
        prefix.move(moved)
        assert prefix.held_bytes == held * 2 // 3
        with prefix.reused(model, "batch", prefix.unchanged(moved)) as skipped:
            assert skipped == 2
            assert torch.equal(model(ids).logits, expected)
        assert prefix.held_bytes == held
        with prefix.reused(model, "batch", prefix.unchanged(moved)) as skipped:
            assert skipped == BLOCKS
            assert torch.equal(model(ids).logits, expected)
        assert prefix.unchanged(names) == 2  # the old anchor is any other policy now


def test_other_tokens_are_another_batch(ids: Tensor) -> None:
    model, found = model_of("llama")
    prefix = Prefix(found)
    prefix.move(dict.fromkeys(found.layers, "dense"))
    with torch.inference_mode():
        with prefix.reused(model, "batch", BLOCKS):
            model(ids)
        with prefix.reused(model, "other", BLOCKS - 1) as skipped:
            assert skipped == 0
            assert torch.equal(model(ids.flip(1)).logits, model(ids.flip(1)).logits)


def test_the_cap_is_kept(ids: Tensor) -> None:
    model, found = model_of("llama")
    one = ids.numel() * 32 * 4
    prefix = Prefix(found, cap_bytes=2 * one + 8)
    prefix.move(dict.fromkeys(found.layers, "dense"))
    with torch.inference_mode():
        whole = model(ids).logits
        for _ in range(2):
            with prefix.reused(model, "batch", BLOCKS) as skipped:
                assert torch.equal(model(ids).logits, whole)
        assert skipped == 2
        with prefix.reused(model, "another", BLOCKS):
            model(ids.flip(1))
        with prefix.reused(model, "another", BLOCKS) as skipped:
            assert skipped == 0
    assert prefix.held_bytes == 2 * one


def test_a_broken_pass_leaves_the_model_as_it_was(ids: Tensor) -> None:
    model, found = model_of("llama")
    prefix = Prefix(found)
    prefix.move(dict.fromkeys(found.layers, "dense"))
    whole = model(ids).logits
    for _ in range(2):
        with (
            pytest.raises(KeyboardInterrupt),
            prefix.reused(model, "batch", BLOCKS),
        ):
            model(ids)
            raise KeyboardInterrupt
    assert not any(m._forward_hooks for m in model.modules())
    assert "forward" not in vars(model.model.layers[0])
    assert torch.equal(model(ids).logits, whole)


def test_a_followed_policy_takes_the_place_of_the_anchor(ids: Tensor) -> None:
    model, found = model_of("llama")
    prefix = Prefix(found)
    names: dict[Layer, str] = dict.fromkeys(found.layers, "dense")
    first, last = (
        next(la for la in found.layers if la.block == block) for block in (0, 2)
    )

    def run(variants: dict[Layer, str]) -> int:
        with prefix.reused(model, "batch", prefix.follow(variants)) as skipped:
            reused = model(ids).logits
        assert torch.equal(reused, model(ids).logits)
        return skipped

    with torch.inference_mode():
        assert run(names) == 0  # nothing is known yet
        prefix.adopt(names)
        assert run(names) == BLOCKS
        held = prefix.held_bytes
        change(model, last)
        other = names | {last: "other"}
        assert run(other) == 2
        assert prefix.held_bytes == held * 4 // 3  # two of three blocks are shared
        change(model, first)
        prefix.adopt(names)  # it is not the followed one: nothing happens
        assert run(names | {last: "other", first: "other"}) == 0
        prefix.adopt(other)  # it is no longer followed
        assert prefix.unchanged(names) == BLOCKS
        prefix.adopt(names | {last: "other", first: "other"})
        assert prefix.held_bytes == held
        assert prefix.unchanged(names) == 0
