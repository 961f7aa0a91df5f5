"""Biases that variants bring are put on modules, and leave no trace."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import tiny
from torch import Tensor, nn

from autoprune.compression.apply import StitchedModel
from autoprune.errors import ModelError
from autoprune.models.biases import added_bias, bias_of, put_bias, with_bias
from autoprune.models.layers import inventory, read_weight
from autoprune.policy import Action, Layer

ONE, TWO = Action.parse("a(x=1)"), Action.parse("a(x=2)")
OWN = {"llama": False, "gpt2": True, "opt": True, "qwen2": False}


def layer_of(model: nn.Module, index: int = -1) -> Layer:
    return inventory(model, register_architectures()).layers[index]


def outputs(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=torch.arange(3, 13)[None]).logits
    return logits


def test_a_weight_computes_without_its_bias() -> None:
    plain, bias = torch.arange(6.0).view(2, 3), torch.tensor([1.0, 2.0])
    weight = with_bias(plain, bias)
    assert torch.equal(weight, plain) and bias_of(weight) is bias
    assert with_bias(plain, None) is plain and bias_of(plain) is None
    for computed in (weight * 2, weight.t(), weight.to(torch.bfloat16), weight[0]):
        assert type(computed) is Tensor and bias_of(computed) is None


@pytest.mark.parametrize("kind", OWN)
def test_it_is_added_and_taken_off_exactly(kind: str, rng: torch.Generator) -> None:
    model = tiny(kind)
    layer = layer_of(model)  # the taker of the last MLP
    module: Any = model.get_submodule(layer.name)
    own, before, names = module.bias, outputs(model), list(model.state_dict())
    assert (own is not None) == OWN[kind]
    seen: list[Tensor] = []
    for _ in range(2):
        bias = torch.randn(layer.shape[0], generator=rng)
        seen.clear()
        hook = module.register_forward_hook(lambda m, a, out: seen.append(out))
        put_bias(model, layer, None)
        outputs(model)
        put_bias(model, layer, torch.ones_like(bias))
        put_bias(model, layer, bias)  # takes the place of the one before
        assert added_bias(module) is bias
        outputs(model)
        hook.remove()
        torch.testing.assert_close(seen[1] - seen[0], bias.expand_as(seen[0]))
    put_bias(model, layer, None)
    assert module.bias is own and added_bias(module) is None
    assert torch.equal(outputs(model), before)
    assert list(model.state_dict()) == names


def test_the_sum_is_rounded_as_it_will_be_stored() -> None:
    model = tiny("gpt2").to(torch.bfloat16)
    layer = layer_of(model)
    module: Any = model.get_submodule(layer.name)
    module.bias.data.fill_(1.0)
    model.float()
    put_bias(model, layer, torch.full((32,), 2.0**-9))  # half a unit in the last place
    assert module.bias.dtype == torch.float32 and torch.equal(
        module.bias, torch.ones(32)
    )
    put_bias(model, layer, torch.full((32,), 2.0**-7))
    assert torch.equal(module.bias, torch.full((32,), 1 + 2.0**-7))


def test_a_copy_of_the_model_has_it_as_its_own() -> None:
    model = tiny("llama")
    layer = layer_of(model)
    put_bias(model, layer, torch.ones(32))
    copy = deepcopy(model)
    module: Any = copy.get_submodule(layer.name)
    assert type(module.bias) is nn.Parameter and added_bias(module) is None
    assert torch.equal(outputs(copy), outputs(model))
    put_bias(model, layer, None)
    assert torch.equal(module.bias, torch.ones(32))


def test_an_expert_has_no_place_for_one() -> None:
    model = tiny("mixtral")
    layer = layer_of(model)
    put_bias(model, layer, None)
    with pytest.raises(
        ModelError, match=r"down_proj\[3\]' cannot have a bias: .* no mo"
    ):
        put_bias(model, layer, torch.ones(32))
    embedding = layer_of(model, 0)
    with pytest.raises(ModelError, match="it is Embedding. Take a method that adds"):
        put_bias(model, embedding, torch.ones(64))


@pytest.mark.parametrize("kind", OWN)
def test_a_stitched_model_is_restored(kind: str, rng: torch.Generator) -> None:
    model = tiny(kind)
    stitched = StitchedModel(model, (layer := layer_of(model),))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight, bias = read_weight(model, layer).clone(), torch.ones(layer.shape[0])
    module: Any = model.get_submodule(layer.name)
    stitched.write(layer, ONE, with_bias(weight * 2, bias))
    assert torch.equal(read_weight(model, layer), weight * 2)
    assert added_bias(module) is bias
    stitched.write(layer, TWO, weight * 3)  # a variant without one
    assert added_bias(module) is None
    stitched.write(layer, ONE, with_bias(weight * 2, bias))
    stitched.restore()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
