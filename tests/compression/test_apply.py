"""Variants are put on a model and taken off without a trace."""

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import tiny
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from autoprune.compression.apply import StitchedModel
from autoprune.errors import PolicyError
from autoprune.models.layers import inventory, read_weight
from autoprune.policy import DENSE, Action, Layer

HALF, THIRD = Action.parse("a(x=1)"), Action.parse("a(x=2)")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other)


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    return inventory(model, register_architectures()).layers


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss", "qwen2"])
def test_dense_restores_bit_for_bit(kind: str, rng: torch.Generator) -> None:
    model = tiny(kind)
    before = state(model)
    stitched = StitchedModel(model, layers_of(model))
    for action in (HALF, THIRD):  # twice: what is kept is the dense weight
        for layer in stitched.layers:
            weight = torch.randn(layer.shape, generator=rng)
            stitched.write(layer, action, weight)
            assert torch.equal(read_weight(model, layer), weight)
    assert not same(state(model), before)
    stitched.restore()
    assert same(state(model), before)
    assert set(stitched.actions.values()) == {DENSE}


def test_only_what_changed_is_named(tiny_model: LlamaForCausalLM) -> None:
    layers = layers_of(tiny_model)
    stitched = StitchedModel(tiny_model, layers)
    first, second, third = layers[1:4]
    assert stitched.changes({first: HALF, second: DENSE}) == {first: HALF}
    stitched.write(first, HALF, torch.zeros(first.shape))
    stitched.write(second, HALF, torch.zeros(second.shape))
    wanted = {first: HALF, second: THIRD, third: HALF}
    assert stitched.changes(wanted) == {second: THIRD, third: HALF}
    assert stitched.changes({}) == {first: DENSE, second: DENSE}


def test_the_dense_weight_is_known_whatever_is_on_the_layer(
    tiny_model: LlamaForCausalLM,
) -> None:
    layer = layers_of(tiny_model)[1]
    before = read_weight(tiny_model, layer).clone()
    stitched = StitchedModel(tiny_model, (layer,))
    assert torch.equal(stitched.dense_weight(layer), before)
    stitched.write(layer, HALF, torch.zeros(layer.shape))
    assert torch.equal(stitched.dense_weight(layer), before)


@pytest.mark.parametrize(
    ("stored", "compute"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
        (torch.bfloat16, None),
    ],
    ids=str,
)
def test_dense_weights_keep_the_type_that_is_stored(
    stored: torch.dtype, compute: torch.dtype | None, tiny_model: LlamaForCausalLM
) -> None:
    model = tiny_model.to(stored)
    with torch.no_grad():  # a number that only the stored type holds
        model.model.layers[0].mlp.down_proj.weight[0, 0] = (
            1 + 2 * torch.finfo(stored).eps
        )
    layers = layers_of(model)
    before = {layer: read_weight(model, layer).clone() for layer in layers}
    stitched = StitchedModel(model, layers, compute_dtype=compute)
    assert stitched.dtype == (compute or stored)
    computed = state(model)
    for layer in layers:
        assert torch.equal(stitched.dense_weight(layer), before[layer])
        stitched.write(layer, HALF, torch.zeros(layer.shape))
        assert torch.equal(stitched.dense_weight(layer), before[layer])
        assert stitched.dense_weight(layer).dtype == stored
    stitched.restore()
    assert same(state(model), computed)


def test_tied_weights_stay_tied_and_buffers_stay_precise(
    tiny_model: LlamaForCausalLM,
) -> None:
    stitched = StitchedModel(
        tiny_model, layers_of(tiny_model), compute_dtype=torch.bfloat16
    )
    assert tiny_model.lm_head.weight is tiny_model.model.embed_tokens.weight
    assert stitched.dtype == torch.bfloat16
    assert {b.dtype for b in tiny_model.buffers()} == {torch.float32}


def test_a_weight_of_another_shape_leaves_all_as_it_was(
    tiny_model: LlamaForCausalLM,
) -> None:
    layer = layers_of(tiny_model)[1]
    stitched = StitchedModel(tiny_model, (layer,))
    before = state(tiny_model)
    with pytest.raises(PolicyError, match=r"has shape \(3, 3\), expected"):
        stitched.write(layer, HALF, torch.zeros(3, 3))
    assert stitched.actions[layer] == DENSE
    assert same(state(tiny_model), before)


def test_the_dense_weight_is_not_copied(tiny_model: LlamaForCausalLM) -> None:
    """It may be mapped from a file, and then takes no memory of the process."""
    layer = layers_of(tiny_model)[1]
    place = read_weight(tiny_model, layer).data_ptr()
    stitched = StitchedModel(tiny_model, (layer,))
    stitched.write(layer, HALF, torch.zeros(layer.shape))
    assert read_weight(tiny_model, layer).data_ptr() != place
    assert stitched.dense_weight(layer).data_ptr() == place
    stitched.restore()
    assert read_weight(tiny_model, layer).data_ptr() == place


def test_a_swap_is_seen_by_whoever_remembers_a_weight_by_its_version() -> None:
    """As the teacher does with heads: it would go on with the one of before."""
    model = tiny("llama")
    stitched = StitchedModel(model, layers_of(model))
    layer = next(la for la in stitched.layers if la.name.endswith("down_proj"))
    parameter = model.get_parameter(f"{layer.name}.weight")
    before = parameter._version
    stitched.write(layer, HALF, torch.zeros(layer.shape))
    assert parameter._version > before
    after = parameter._version
    stitched.write(layer, DENSE, None)
    assert parameter._version > after
