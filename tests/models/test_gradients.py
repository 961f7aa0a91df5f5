"""Gradients agree with torch's own, and leave the model as it was."""

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.tasks import CausalLM, MaskedLM
from tiny_models import tiny
from torch import Tensor, nn
from torch.nn import functional

from autoprune.compression.apply import StitchedModel
from autoprune.errors import ModelError
from autoprune.models.gradients import (
    SUMS,
    TaskLoss,
    hessian_gradients,
    listening,
    loss_gradients,
)
from autoprune.models.layers import inventory, read_weight
from autoprune.models.weights import parameter_of, view_of_layer
from autoprune.policy import Layer

LOSS = TaskLoss(CausalLM(), None)


def windows(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 60, (count, 12), generator=generator)


def layers_of(model: nn.Module) -> list[Layer]:
    found = inventory(model, register_architectures()).layers
    return [layer for layer in found if layer.block is not None]


def torchs_own(
    model: nn.Module, ids: Tensor, layers: list[Layer]
) -> dict[Layer, Tensor]:
    """Give the gradient of the mean loss of some windows, with no code of ours."""
    names = {layer: parameter_of(layer.name) for layer in layers}
    parameters = {name: model.get_parameter(name) for name in names.values()}
    for parameter in parameters.values():
        parameter.requires_grad_()
    with torch.enable_grad():
        logits = model(ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        found = torch.autograd.grad(loss, list(parameters.values()))
    model.requires_grad_(False)
    by_name = dict(zip(parameters, found, strict=True))
    views = {la: view_of_layer(model, la.name, by_name[n]) for la, n in names.items()}
    return {layer: view for layer, view in views.items() if view is not None}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_as_before(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral", "gemma2"])
def test_gradients_are_torchs_own(kind: str) -> None:
    model, ids = tiny(kind), windows()
    layers, before = layers_of(model), state(tiny(kind))
    found = loss_gradients(model, LOSS, ids, dict.fromkeys(layers, SUMS))
    each = [torchs_own(model, one, layers) for one in ids.split(1)]
    for layer in layers:
        own = torch.stack([gradients[layer] for gradients in each])
        assert found[layer].windows == 3
        assert found[layer].mean is not None
        torch.testing.assert_close(found[layer].mean, own.mean(0), rtol=1e-4, atol=1e-6)
        expected = own.square().sum(0)
        torch.testing.assert_close(
            found[layer].square_sum, expected, rtol=1e-3, atol=1e-9
        )
    assert_as_before(model, before)


def test_the_mean_of_windows_is_that_of_the_batch() -> None:
    model, ids = tiny("llama"), windows()
    layers = layers_of(model)
    found = loss_gradients(model, LOSS, ids, dict.fromkeys(layers, {"gradient"}))
    together = torchs_own(model, ids, layers)
    for layer in layers:
        torch.testing.assert_close(
            found[layer].mean, together[layer], rtol=1e-4, atol=1e-6
        )
        assert found[layer].square_sum is None


def test_a_layer_does_not_depend_on_what_is_asked_beside_it() -> None:
    model, ids = tiny("llama"), windows()
    layers = layers_of(model)
    every = loss_gradients(model, LOSS, ids, dict.fromkeys(layers, SUMS))
    alone = loss_gradients(model, LOSS, ids, {layers[5]: {"gradient"}})
    assert every[layers[5]].mean is not None
    assert torch.equal(every[layers[5]].mean, alone[layers[5]].mean)


def test_bfloat16_gives_float32_sums_near_those_of_float32() -> None:
    model, ids = tiny("llama"), windows()
    layers = layers_of(model)
    needs = dict.fromkeys(layers, {"gradient"})
    full = loss_gradients(model, LOSS, ids, needs)
    found = inventory(model, register_architectures())
    StitchedModel(model, found.layers, compute_dtype=torch.bfloat16)
    half = loss_gradients(model, LOSS, ids, needs)
    for layer in layers:
        one, other = full[layer].mean, half[layer].mean
        assert one is not None and other is not None and other.dtype == torch.float32
        assert float((one - other).norm() / one.norm()) < 0.1


def test_a_masked_model_has_gradients_too() -> None:
    class Tokenizer:
        mask_token_id = 4

    model = tiny("bert")
    layers, loss = layers_of(model), TaskLoss(MaskedLM(), Tokenizer())
    found = loss_gradients(model, loss, windows(), {layers[0]: {"gradient"}})
    assert found[layers[0]].mean is not None and found[layers[0]].mean.any()


def test_only_what_is_listened_to_gets_gradients() -> None:
    model = tiny("llama")
    first, *_, last = layers_of(model)
    heard: list[Layer] = []
    with listening(model, [first, last], lambda layer, _: heard.append(layer)):
        needing = [name for name, p in model.named_parameters() if p.requires_grad]
        LOSS.backward(model, windows(1))
        assert all(p.grad is None for p in model.parameters())
    assert needing == [parameter_of(first.name), parameter_of(last.name)]
    assert heard == [last, first]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_model_without_a_head_is_refused() -> None:
    model = tiny("llama").model
    with pytest.raises(ModelError, match="LlamaModel has no linear output layer"):
        LOSS.backward(model, windows(1))


def double_backward(
    model: nn.Module, ids: Tensor, layers: list[Layer], temperature: float
) -> dict[Layer, Tensor]:
    """Give the Hessian times the gradient exactly, by a graph of the gradient."""
    parameters = [model.get_parameter(parameter_of(layer.name)) for layer in layers]
    for parameter in parameters:
        parameter.requires_grad_()
    with torch.enable_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1) / temperature
        loss = functional.cross_entropy(logits, ids[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        square = sum((g * g.detach()).sum() for g in gradients)
        assert isinstance(square, Tensor)
        found = torch.autograd.grad(square, parameters)
    model.requires_grad_(False)
    return dict(zip(layers, found, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_the_product_with_the_hessian_is_that_of_a_double_backward(
    temperature: float,
) -> None:
    model, ids = tiny("llama", attn_implementation="eager"), windows()
    layers, before = layers_of(model), state(model)
    expected = double_backward(model, ids, layers, temperature)
    found = hessian_gradients(model, LOSS, ids, layers, layers, temperature=temperature)
    for layer in layers:
        off = (found[layer] - expected[layer]).norm() / expected[layer].norm()
        assert float(off) < 0.02, layer.name
    assert_as_before(model, before)


def test_the_product_of_a_layer_is_over_all_layers_whichever_are_asked() -> None:
    model, ids = tiny("llama"), windows()
    layers = layers_of(model)
    every = hessian_gradients(model, LOSS, ids, layers, layers)
    alone = hessian_gradients(model, LOSS, ids, layers[:1], layers)
    assert torch.equal(alone[layers[0]], every[layers[0]])


def test_where_nothing_slopes_the_product_is_zero() -> None:
    model = tiny("llama")
    layers = layers_of(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = hessian_gradients(model, LOSS, windows(), layers[:1], layers)
    assert not found[layers[0]].any()
    assert read_weight(model, layers[0]).any()
