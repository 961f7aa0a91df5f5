"""Biases that variants bring along: put on a loaded model, and taken off again.

A variant's bias is added to what its layer has of its own, or stands alone where it has
none. It travels with the weight that it belongs to, so that whoever holds one has both.
"""

from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.policy import Layer


class BiasedWeight(Tensor):
    """A weight together with a bias.

    It computes as any tensor does, without the bias.

    Attributes:
        bias: What is added to the layer's own bias, ``[out]``.
    """

    bias: Tensor

    # As nn.Parameter does: what is computed from it is a plain tensor.
    __torch_function__: Any = torch._C._disabled_torch_function_impl


def with_bias(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "out in"]:
    """Give a weight that brings a bias; the weight itself if there is none."""
    if bias is None:
        return weight
    biased = weight.as_subclass(BiasedWeight)
    biased.bias = bias
    return biased


def bias_of(weight: Tensor) -> Float[Tensor, " out"] | None:
    """Give the bias that a weight brings; None if it brings none."""
    return weight.bias if isinstance(weight, BiasedWeight) else None


class AddedBias(nn.Parameter):
    """A module's bias while a variant adds to it; remembers what it stands for.

    Attributes:
        own: The module's own bias; None if it has none.
        added: What the variant adds, as it was given.
    """

    own: nn.Parameter | None
    added: Tensor

    @classmethod
    def of(cls, own: nn.Parameter | None, added: Tensor, total: Tensor) -> Self:
        """Make the parameter that holds ``total``."""
        made = cls(total, requires_grad=False)
        made.own, made.added = own, added
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Give a plain parameter: a copy of the model has the bias as its own."""
        memo[id(self)] = copy = nn.Parameter(self.data.clone(), requires_grad=False)
        return copy


def put_bias(
    model: nn.Module, layer: Layer, bias: Float[Tensor, " out"] | None
) -> None:
    """Add a bias to a layer's own, in the place of any that was added before.

    The sum is rounded to the layer's stored type first, so that a model that computes
    in another type has the same bias as its export.

    Args:
        model: The model.
        layer: The layer.
        bias: What to add; None to leave the layer with its own parameter again.

    Raises:
        ModelError: If the layer is no module that can have a bias.
    """
    try:
        module: Any = model.get_submodule(layer.name)
    except AttributeError:  # an expert is a slice of a parameter
        module = None
    now = getattr(module, "bias", None)
    own = now.own if isinstance(now, AddedBias) else now
    if bias is None:
        if now is not own:
            module.bias = own
        return
    if not hasattr(module, "bias"):
        raise ModelError(
            f"layer {layer.name!r} cannot have a bias: in {type(model).__name__} it is "
            f"{'no module' if module is None else type(module).__name__}. Take a "
            "method that adds none, such as flap(bias=false)"
        )
    total = bias.double() if own is None else own.detach().double() + bias.double()
    total = total.to(getattr(torch, layer.dtype)).to(module.weight.dtype)
    module.bias = AddedBias.of(own, bias, total)


def added_bias(module: nn.Module) -> Float[Tensor, " out"] | None:
    """Give what a variant has added to a module's bias; None if nothing."""
    now = getattr(module, "bias", None)
    return now.added if isinstance(now, AddedBias) else None
