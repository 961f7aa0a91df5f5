"""Pruned weights stay ``+0.0`` at every step, whatever trains the others."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import tiny
from torch import Tensor, nn
from transformers.optimization import Adafactor

from autoprune.errors import ModelError
from autoprune.models.layers import inventory
from autoprune.models.weights import read_weight, write_weight
from autoprune.policy import Layer
from autoprune.training.masks import FrozenMasks

KINDS = ["llama", "gpt2", "mixtral", "qwen2"]
"""Linear layers, Conv1D, experts in 3-D parameters, a head that is the embedding."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.3, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.3
    ),
    "adafactor": lambda p: Adafactor(
        p, lr=0.05, relative_step=False, scale_parameter=False, beta1=0.9
    ),
    "adafactor by itself": lambda p: Adafactor(p, weight_decay=0.3),
}


def layers_of(model: nn.Module) -> list[Layer]:
    found = inventory(model, register_architectures()).layers
    return [layer for layer in found if layer.block is not None]


def named(name: str, shape: tuple[int, int]) -> Layer:
    return Layer(name, shape, "float32", block=None, role=name, input=None)


def halves(layers: list[Layer]) -> dict[Layer, Tensor]:
    """Prune about half of each layer, in no order."""
    generator = torch.Generator().manual_seed(1)
    return {la: torch.rand(la.shape, generator=generator) < 0.5 for la in layers}


def backward(model: nn.Module, seed: int) -> None:
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(seed))
    with torch.enable_grad():
        model(input_ids=ids, labels=ids).loss.backward()


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 4
) -> Iterator[None]:
    """Train, with gradients of two batches a step; gives way after each step."""
    for step in range(count):
        optimizer.zero_grad()
        backward(model, 2 * step)
        backward(model, 2 * step + 1)
        optimizer.step()
        yield


def bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_zero_after_every_step(kind: str, name: str) -> None:
    model = tiny(kind).requires_grad_()
    layers = layers_of(model)
    if kind == "qwen2":
        layers.append(named("model.embed_tokens", (64, 32)))
    kept = halves(layers)
    masks = FrozenMasks(model, kept)
    before = {layer: read_weight(model, layer).clone() for layer in layers}
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    with masks.held(optimizer):
        for _ in steps(model, optimizer):
            masks.check()
            for layer, mask in kept.items():
                assert not bits(read_weight(model, layer))[~mask].any(), layer.name
    for layer in kept:
        now = read_weight(model, layer)
        assert now.isfinite().all()
        assert not torch.equal(now, before[layer]), f"{layer.name} was not trained"
    assert sum(masks.pruned.values()) == sum(int((~m).sum()) for m in kept.values())


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if "adafactor" not in n])
def test_an_optimizer_remembers_nothing_of_pruned_weights(name: str) -> None:
    model = tiny("llama").requires_grad_()
    layer = layers_of(model)[0]
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for _ in steps(model, optimizer, 3):  # dense: all weights have a momentum
        pass
    weight = model.get_parameter(f"{layer.name}.weight")

    def remembered() -> list[Tensor]:
        state = optimizer.state[weight].values()
        return [value for value in state if value.shape == weight.shape]

    mask = halves([layer])[layer]
    assert all((value[~mask] != 0).any() for value in remembered())
    masks = FrozenMasks(model, {layer: mask})
    with masks.held(optimizer):
        for _ in steps(model, optimizer, 3):
            masks.check()
            for value in remembered():
                assert not value[~mask].any()
                assert value[mask].any()


def test_without_masks_weights_come_back() -> None:
    model = tiny("llama").requires_grad_()
    layers = layers_of(model)
    masks = FrozenMasks(model, halves(layers))
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    for _ in steps(model, optimizer, 1):
        pass
    with pytest.raises(ModelError, match=r"of \d+ pruned weights of .* no longer zero"):
        masks.check()


def test_what_an_optimizer_adds_on_its_own_does_not_stay() -> None:
    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.ones_like(parameter)).neg_()

    model = tiny("llama").requires_grad_()
    masks = FrozenMasks(model, halves(layers_of(model)))
    optimizer = Noisy(model.parameters(), lr=0.1)
    with masks.held(optimizer):
        for _ in steps(model, optimizer, 2):
            masks.check()


def test_minus_zero_is_not_zero() -> None:
    model = tiny("llama")
    layer = layers_of(model)[0]
    write_weight(model, layer, -read_weight(model, layer).abs())
    masks = FrozenMasks(model, halves([layer]))
    masks.check()  # set with a sign, they would be -0.0
    with torch.no_grad():
        read_weight(model, layer).mul_(-1.0)
    with pytest.raises(ModelError, match="no longer zero"):
        masks.check()
    masks.apply()
    masks.check()


def test_minus_zero_counts_as_pruned_when_found() -> None:
    model = tiny("llama")
    layer, other = layers_of(model)[:2]
    weight = read_weight(model, layer)
    with torch.no_grad():
        weight[0, :3] = torch.tensor([0.0, -0.0, 1.0])
    masks = FrozenMasks.of_zeros(model, [layer, other])
    assert masks.pruned == {f"{layer.name}.weight": 2}
    masks.check()


def test_gradients_are_clipped_to_the_norm_of_what_lives() -> None:
    model = tiny("gpt2").requires_grad_()
    layers = layers_of(model)
    kept = halves(layers)
    masks = FrozenMasks(model, kept)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, 0)
    for name, pruned in masks.parameters():
        model.get_parameter(name).grad.masked_fill_(pruned, 0.0)  # type: ignore[union-attr]
    wanted = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.zero_grad()
    with masks.held(optimizer):
        backward(model, 0)
        found = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert found == wanted


def test_one_expert_is_pruned_and_the_others_are_not() -> None:
    model = tiny("mixtral").requires_grad_()
    layer = next(la for la in layers_of(model) if la.name.endswith("down_proj[2]"))
    masks = FrozenMasks(model, {layer: torch.zeros(layer.shape, dtype=torch.bool)})
    name = layer.name.removesuffix("[2]")
    assert masks.pruned == {name: layer.shape[0] * layer.shape[1]}
    zero = (model.get_parameter(name) == 0).flatten(1)
    assert zero.all(1).tolist() == [False, False, True, False]


def test_masks_of_a_conv1d_are_out_by_in() -> None:
    model = tiny("gpt2")
    layer = next(la for la in layers_of(model) if la.shape[0] != la.shape[1])
    mask = torch.ones(layer.shape, dtype=torch.bool)
    mask[3] = False  # one output
    FrozenMasks(model, {layer: mask})
    weight = model.get_submodule(layer.name).weight
    assert tuple(weight.shape) == layer.shape[::-1]
    assert not weight[:, 3].any() and weight[:, 4].any()


def test_layers_that_share_a_weight_share_what_is_pruned() -> None:
    model = tiny("qwen2").requires_grad_()
    embedding = named("model.embed_tokens", (64, 32))
    head = named("lm_head", (64, 32))
    one, other = torch.ones(2, 64, 32, dtype=torch.bool)
    one[5], other[6] = False, False
    masks = FrozenMasks(model, {embedding: one, head: other})
    assert masks.pruned == {"model.embed_tokens.weight": 64}
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    with masks.held(optimizer):
        for _ in steps(model, optimizer, 2):
            masks.check()
            assert not bits(model.lm_head.weight)[5:7].any()


def test_hooks_are_gone_afterwards() -> None:
    model = tiny("llama").requires_grad_()
    layers = layers_of(model)
    masks = FrozenMasks(model, halves(layers))
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    with pytest.raises(KeyboardInterrupt), masks.held(optimizer):
        raise KeyboardInterrupt
    backward(model, 0)
    name, pruned = next(masks.parameters())
    gradient = model.get_parameter(name).grad
    assert gradient is not None and gradient[pruned].any()
    optimizer.step()
    with pytest.raises(ModelError, match="no longer zero"):
        masks.check()


def test_a_mask_has_the_shape_of_its_layer() -> None:
    model = tiny("llama")
    layer = next(la for la in layers_of(model) if la.shape[0] != la.shape[1])
    mask = torch.ones(layer.shape[::-1], dtype=torch.bool)
    with pytest.raises(
        ModelError, match=rf"{layer.name}.* has shape \({mask.shape[0]}"
    ):
        FrozenMasks(model, {layer: mask})
    unknown = named("model.layers.9.q_proj", (2, 2))
    with pytest.raises(ModelError, match=r"no layer 'model.layers.9.q_proj'"):
        FrozenMasks(model, {unknown: torch.ones(2, 2, dtype=torch.bool)})
