"""Pruned weights that stay at zero while the others are trained."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.weights import parameter_of, read_weight, view_of_layer
from autoprune.policy import Layer


class FrozenMasks:
    """Which weights of a model are kept; the others are ``+0.0``, whatever is trained.

    Masks are held by parameter and lie beside it on its device: layers may share one,
    as experts do and as a head does that is the embedding. A weight that one of them
    has pruned is pruned.

    Args:
        model: The model; its pruned weights are set to zero at once.
        kept: For each pruned layer, True where a weight stays.

    Attributes:
        model: The model.

    Raises:
        ModelError: If the model lacks a layer, or a mask has another shape.
    """

    def __init__(
        self, model: nn.Module, kept: Mapping[Layer, Bool[Tensor, "out in"]]
    ) -> None:
        self.model = model
        self._masks: dict[str, Tensor] = {}  # by parameter, True where it is pruned
        names = {parameter: name for name, parameter in model.named_parameters()}
        for layer, mask in kept.items():
            shape = tuple(read_weight(model, layer).shape)
            if tuple(mask.shape) != shape:
                raise ModelError(
                    f"the mask of layer {layer.name!r} has shape {tuple(mask.shape)}, "
                    f"the layer {shape}. Give a mask as [out, in]."
                )
            parameter = model.get_parameter(parameter_of(layer.name))
            name = names[parameter]
            if name not in self._masks:
                self._masks[name] = torch.zeros_like(parameter, dtype=torch.bool)
            view = view_of_layer(model, layer.name, self._masks[name])
            assert view is not None
            view.logical_or_(~mask.to(view.device))
        self.apply()

    @classmethod
    def of_zeros(cls, model: nn.Module, layers: Iterable[Layer]) -> "FrozenMasks":
        """Take what is zero now as pruned, in layers that have a zero."""
        kept = {layer: read_weight(model, layer) != 0 for layer in layers}
        return cls(
            model, {layer: mask for layer, mask in kept.items() if not mask.all()}
        )

    @property
    def pruned(self) -> dict[str, int]:
        """How many weights are pruned, by the name of their parameter."""
        return {name: int(mask.sum()) for name, mask in self._masks.items()}

    def parameters(self) -> Iterator[tuple[str, Bool[Tensor, "..."]]]:
        """Give the name of each parameter that is pruned, and True where it is."""
        yield from self._masks.items()

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is pruned to ``+0.0``."""
        for parameter, mask in self._pairs():
            parameter.masked_fill_(mask, 0.0)

    def check(self) -> None:
        """See that what is pruned is ``+0.0``, bit by bit.

        Raises:
            ModelError: If it is not; names parameter and count.
        """
        for name, (parameter, mask) in zip(self._masks, self._pairs(), strict=True):
            weight = parameter.detach()
            # ``-0.0 == 0`` holds, but it is stored with another bit.
            revived = mask & ((weight != 0) | weight.signbit())
            if count := int(revived.sum()):
                raise ModelError(
                    f"{count} of {int(mask.sum())} pruned weights of {name} are no "
                    "longer zero. Train inside of FrozenMasks.held."
                )

    @contextmanager
    def held(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Hold the masks at every step of an optimizer, its momentum included.

        Gradients of pruned weights are zero as soon as a backward pass has made them,
        so that their norm, to which others are clipped, is that of the weights that
        live; and again before a step, for who wrote to them meanwhile. What the
        optimizer remembers of pruned weights is forgotten. After a step the weights
        are zero, whatever decay, noise or an old momentum did.
        """

        def before(*_: Any) -> None:
            for parameter, mask in self._pairs():
                _silence(mask, parameter)

        def after(*_: Any) -> None:
            self.apply()

        for parameter, mask in self._pairs():
            for state in optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == mask.shape:
                    state.masked_fill_(mask, 0)
        with ExitStack() as undo:
            for parameter, mask in self._pairs():
                if parameter.requires_grad:
                    hook = partial(_silence, mask)
                    handle = parameter.register_post_accumulate_grad_hook(hook)
                    undo.callback(handle.remove)
            undo.callback(optimizer.register_step_pre_hook(before).remove)
            undo.callback(optimizer.register_step_post_hook(after).remove)
            yield

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, mask in self._masks.items():
            parameter = self.model.get_parameter(name)
            if mask.device != parameter.device:
                mask = self._masks[name] = mask.to(parameter.device)
            yield parameter, mask


def _silence(mask: Tensor, parameter: Tensor) -> None:
    """Let the gradient of what is pruned be zero."""
    if parameter.grad is not None:
        parameter.grad.masked_fill_(mask, 0.0)
