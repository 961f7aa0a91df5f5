"""Synaptic flow: what the sizes of a model's weights alone let through.

SynFlow (Tanaka et al. 2020, arXiv:2006.05467, Sec. 6) sends ones through the network of
the weights' sizes, ``R = 1ᵀ |W_L| ... |W_1| 1``, and asks how ``R`` depends on each.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoprune.errors import ModelError
from autoprune.models.computing import computing_in
from autoprune.models.gradients import TaskLoss, listening
from autoprune.models.weights import MATRICES
from autoprune.policy import Layer

POSITIONS = 2
"""Length of the window of ones: the shortest of which every task scores a position."""


@contextmanager
def network_of_sizes(model: nn.Module) -> Iterator[None]:
    """Let every parameter be its absolute value for a while, free to be written to.

    Embeddings then give ones, and images are ones. A norm multiplies by the sizes of
    its factors, which are constants to a gradient: as a norm does not feel the scale of
    its input, the flow through it would cancel.
    """
    with computing_in(model, torch.float32, copy=True), ExitStack() as undo:
        for parameter in model.parameters():
            parameter.data.abs_()
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                undo.callback(module.register_forward_hook(_straighten).remove)
        undo.callback(_let_in_ones(model).remove)
        yield


def synaptic_flows(
    model: nn.Module,
    loss: TaskLoss,
    ids: Int[Tensor, "windows length"],
    layers: Collection[Layer],
    *,
    reached_only: bool = False,
) -> dict[Layer, Float[Tensor, "out in"]]:
    """Give the gradient of ``R`` by the sizes of each layer's weights; no data is used.

    ``R`` does not depend on some layers: all positions hold the same, so what queries
    and keys say makes no difference, and rounding alone gives them a gradient, of both
    signs. Their ``R`` is the sum of their own outputs; where a layer is no module of
    its own (an expert that is not chosen) all flows are 1.

    Args:
        model: A model within ``network_of_sizes``.
        loss: Whose task and tokenizer make a batch.
        ids: Windows, of which only the form counts.
        layers: The layers.
        reached_only: Leave those out that ``R`` does not depend on.
    """
    found: dict[Layer, Tensor] = {}
    inputs: dict[Layer, Tensor] = {}

    def keep(layer: Layer, gradient: Tensor) -> None:
        found[layer] = gradient.clone()

    with ExitStack() as undo, torch.enable_grad():
        undo.enter_context(listening(model, layers, keep))
        modules = dict(model.named_modules())
        for layer in layers:
            module = modules.get(layer.name)
            if isinstance(module, MATRICES):
                see = partial(_see, inputs, layer)
                undo.callback(module.register_forward_pre_hook(see).remove)
        few = loss.task.first_positions(ids[:1], POSITIONS)
        batch = loss.task.batch(few, loss.tokenizer)
        features = loss.task.features(model, batch)
        out = loss.task.head(model).weight.sum(0)
        features.backward(out.expand_as(features))
    reached = {la: flow for la, flow in found.items() if _is_reached(flow)}
    if reached_only:
        return reached
    for layer in layers:
        if layer not in reached:
            read = inputs.get(layer, torch.ones(layer.shape[1]))
            reached[layer] = read.expand(layer.shape).clone()
    return reached


def _is_reached(flow: Float[Tensor, "out in"]) -> bool:
    return bool(flow.any()) and not bool((flow < 0).any())


def _let_in_ones(model: nn.Module) -> RemovableHandle:
    """Put ones in the place of what a model's embedding gives, or of pixels."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # it has none, in either way
        found = None
    if isinstance(found, nn.Module):
        return found.register_forward_hook(_ones)
    if getattr(model, "main_input_name", None) == "pixel_values":
        return model.register_forward_pre_hook(_white, with_kwargs=True)
    raise ModelError(
        f"{type(model).__name__} has no input embedding (found {found!r}), which "
        "synaptic flow puts ones in the place of. Use a method without it, such "
        "as magnitude"
    )


def _white(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pixels = torch.ones_like(kwargs["pixel_values"])
    return args, {**kwargs, "pixel_values": pixels}


def _ones(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.ones_like(output)


def _straighten(
    module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Give the sizes of what a norm gives, as its input times constants."""
    read = inputs[0]
    factors = torch.where(read == 0, 0.0, output / read).abs().detach()
    return read * factors


def _see(
    seen: dict[Layer, Tensor],
    layer: Layer,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
) -> None:
    seen[layer] = inputs[0].detach().flatten(0, -2).sum(0)
