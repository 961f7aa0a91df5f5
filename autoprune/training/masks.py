"""Pruned weights that stay at zero while the others are trained."""

from collections.abc import Collection, Iterable, Iterator, Mapping
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
            whole = self._mask_of(names[parameter], parameter)
            view = view_of_layer(model, layer.name, whole)
            assert view is not None
            view.logical_or_(~mask.to(view.device))
        self.apply()

    @classmethod
    def of_parameters(
        cls, model: nn.Module, kept: Mapping[str, Bool[Tensor, "..."]]
    ) -> "FrozenMasks":
        """Hold masks of parameters by name, of any shape, such as kernels of Conv2d.

        Args:
            model: The model; its pruned weights are set to zero at once.
            kept: For each parameter's name, True where a weight stays.

        Raises:
            ModelError: If the model lacks a parameter, or a mask has another shape.
        """
        masks = cls(model, {})
        named = named_parameters(model, kept)
        names = {parameter: name for name, parameter in model.named_parameters()}
        for name, mask in kept.items():
            if mask.shape != named[name].shape:
                raise ModelError(
                    f"the mask of parameter {name!r} has shape {tuple(mask.shape)}, "
                    f"the parameter {tuple(named[name].shape)}. Give one bool a weight."
                )
            whole = masks._mask_of(names[named[name]], named[name])
            whole.logical_or_(~mask.to(whole.device))
        masks.apply()
        return masks

    @classmethod
    def of_none(cls, model: nn.Module, names: Iterable[str]) -> "FrozenMasks":
        """Prune nothing of some parameters yet; ``replace`` may later."""
        named = named_parameters(model, names)
        return cls.of_parameters(
            model,
            {name: torch.ones_like(p, dtype=torch.bool) for name, p in named.items()},
        )

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
        for name, (_, mask) in zip(self._masks, self._pairs(), strict=True):
            yield name, mask

    def of(self, layer: Layer) -> Bool[Tensor, "out in"] | None:
        """View the mask of a layer, True where a weight is pruned; None without one."""
        parameter = self.model.get_parameter(parameter_of(layer.name))
        for name, mask in self.parameters():
            if self.model.get_parameter(name) is parameter:
                return view_of_layer(self.model, layer.name, mask)
        return None

    @torch.no_grad()
    def apply(self, *, but: Collection[str] = ()) -> None:
        """Set what is pruned to ``+0.0``, but of the parameters named."""
        for parameter, mask in self._pairs(but):
            parameter.masked_fill_(mask, 0.0)

    def replace(self, pruned: Mapping[str, Bool[Tensor, "..."]]) -> None:
        """Prune other weights of the same parameters from now on, also while held.

        What was pruned and no longer is stays zero until something moves it.

        Args:
            pruned: For each parameter, True where a weight is pruned.

        Raises:
            ModelError: If these are masks of other parameters.
        """
        if strange := sorted(pruned.keys() ^ self._masks.keys()):
            raise ModelError(
                f"{len(pruned)} masks cannot replace {len(self._masks)}: "
                f"{strange[0]!r} is in one of them only. Give one for each parameter "
                "that has one."
            )
        for name, mask in pruned.items():
            self._masks[name].copy_(mask)  # in place: hooks have these tensors
        self.apply()

    @torch.no_grad()
    def forget(
        self, optimizer: torch.optim.Optimizer, *, but: Collection[str] = ()
    ) -> None:
        """Let an optimizer remember nothing of what is pruned: momentum, variance."""
        for parameter, mask in self._pairs(but):
            for state in optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == mask.shape:
                    state.masked_fill_(mask, 0)

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
    def held(
        self, optimizer: torch.optim.Optimizer, *, but: Collection[str] = ()
    ) -> Iterator[None]:
        """Hold the masks at every step of an optimizer, its momentum included.

        Gradients of pruned weights are zero as soon as a backward pass has made them,
        so that their norm, to which others are clipped, is that of the weights that
        live; and again before a step, for who wrote to them meanwhile. What the
        optimizer remembers of pruned weights is forgotten. After a step the weights
        are zero, whatever decay, noise or an old momentum did.

        Args:
            optimizer: What trains the parameters.
            but: Parameters that somebody else holds.
        """

        def before(*_: Any) -> None:
            for parameter, mask in self._pairs(but):
                _silence(mask, parameter)

        def after(*_: Any) -> None:
            self.apply(but=but)

        self.forget(optimizer, but=but)
        with ExitStack() as undo:
            for parameter, mask in self._pairs(but):
                if parameter.requires_grad:
                    hook = partial(_silence, mask)
                    handle = parameter.register_post_accumulate_grad_hook(hook)
                    undo.callback(handle.remove)
            undo.callback(optimizer.register_step_pre_hook(before).remove)
            undo.callback(optimizer.register_step_post_hook(after).remove)
            yield

    def _mask_of(self, name: str, parameter: nn.Parameter) -> Bool[Tensor, "..."]:
        if name not in self._masks:
            self._masks[name] = torch.zeros_like(parameter, dtype=torch.bool)
        return self._masks[name]

    def _pairs(
        self, but: Collection[str] = ()
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, mask in self._masks.items():
            if name in but:
                continue
            parameter = self.model.get_parameter(name)
            if mask.device != parameter.device:
                mask = self._masks[name] = mask.to(parameter.device)
            yield parameter, mask


def named_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Give parameters of a model by name, in the order of the names.

    Raises:
        ModelError: If the model lacks one.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    names = list(names)
    if unknown := [name for name in names if name not in every]:
        raise ModelError(
            f"the model {type(model).__name__} has no parameter {unknown[0]!r} "
            f"({len(unknown)} of {len(names)} names are unknown). Take names from its "
            "named_parameters()."
        )
    return {name: every[name] for name in names}


def _silence(mask: Tensor, parameter: Tensor) -> None:
    """Let the gradient of what is pruned be zero."""
    if parameter.grad is not None:
        parameter.grad.masked_fill_(mask, 0.0)
