"""Low-rank adapters on the layers of a model, for a while. Loads PEFT: import it late.

An adapter gives a frozen weight ``W`` the change ``scale * B A`` (Hu et al.,
arXiv:2106.09685, Sec. 4.1). PEFT makes, starts and places the matrices; the product
with the input is ours, because a change of full shape would bring pruned weights back:
here the mask acts on ``W + scale * B A`` in every forward pass, so that what is trained
is what is merged.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from peft import LoraConfig, LoraModel
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from autoprune.models.weights import MATRICES
from autoprune.policy import Layer

_NAME = "recovery"
"""What PEFT calls our adapter."""


class AdaptedLayer(Linear):
    """A frozen layer with its adapter: PEFT's, but for the product with the input.

    The gradient of the full weight is made in the backward pass of this layer, and is
    gone with it: masking needs it, and ``W + scale * B A`` is made again there instead
    of being kept for all layers.

    Attributes:
        pruned: True where a weight is pruned, ``[out, in]``; None if none is.
    """

    pruned: Bool[Tensor, "out in"] | None

    def mask(self, pruned: Bool[Tensor, "out in"] | None, *, learnt: bool) -> None:
        """Set what is pruned.

        Args:
            pruned: True where it is; not copied where it lies beside the weight.
            learnt: True if it changes in training, so that checkpoints must keep it.
        """
        beside = None if pruned is None else pruned.to(self.weight.device)
        self.register_buffer("pruned", beside, persistent=learnt)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A, ``[rank, in]``, and B, ``[out, rank]``."""
        found: list[Any] = [self.lora_A[_NAME].weight, self.lora_B[_NAME].weight]
        return found[0], found[1]

    @property
    def scale(self) -> float:
        """Factor of ``B A``: alpha over the rank."""
        return float(self.scaling[_NAME])

    @property
    def frozen(self) -> Float[Tensor, "out in"]:
        """The weight without its change, a view of the parameter."""
        weight = self.weight.detach()
        return weight.t() if isinstance(self.get_base_layer(), Conv1D) else weight

    def change(self) -> Float[Tensor, "out in"]:
        """Give ``scale * B A`` in float32, not masked."""
        a, b = self.factors
        with torch.autocast(b.device.type, enabled=False):
            return (b @ a).mul_(self.scale)

    @torch.no_grad()
    def adapted(self) -> Float[Tensor, "out in"]:
        """Give the weight with its change in float32, ``+0.0`` where it is pruned."""
        return self.masked(self.change().add_(self.frozen))

    def masked(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Set what is pruned to ``+0.0`` in a tensor of one's own, and give it."""
        return weight if self.pruned is None else weight.masked_fill_(self.pruned, 0.0)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Give the layer's output with its change."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias: Tensor | None = self.bias
        dropout = self.lora_dropout[_NAME]
        if isinstance(dropout, nn.Dropout) and self.training:
            # Dropout is of what the adapter reads, not of what the layer does.
            kept = self.masked(self.frozen.clone()).to(x.dtype)
            own = functional.linear(x, kept, None if bias is None else bias.to(x.dtype))
            return own + _product(dropout(x), *self.factors, self, None, False)
        return _product(x, *self.factors, self, bias, True)


class _MaskedProduct(torch.autograd.Function):
    """An input times an adapted weight, with gradients for input and adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        layer: AdaptedLayer,
        bias: Tensor | None,
        whole: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.layer, ctx.whole = layer, whole
        bias = None if bias is None else bias.to(x.dtype)
        return functional.linear(x, _weight(layer, whole).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (given,) = gradients
        x, a, b = ctx.saved_tensors
        layer: AdaptedLayer = ctx.layer
        passed = None
        if ctx.needs_input_grad[0]:
            passed = given @ _weight(layer, ctx.whole).to(given.dtype)
        full = given.flatten(0, -2).t() @ x.flatten(0, -2)  # of the weight: [out, in]
        full = layer.masked(full.float()).mul_(layer.scale)
        return passed, b.t() @ full, full @ a.t(), None, None, None


def _weight(layer: AdaptedLayer, whole: bool) -> Tensor:
    return layer.adapted() if whole else layer.masked(layer.change())


def _product(*arguments: Any) -> Tensor:
    found: Tensor = _MaskedProduct.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True, eq=False)
class Adapters:
    """The adapters of a model while it has them.

    Attributes:
        layers: Each layer with its module.
    """

    layers: dict[Layer, AdaptedLayer]

    def trained(self, model: nn.Module) -> list[str]:
        """Name the parameters of all adapters."""
        wanted = {p for module in self.layers.values() for p in module.factors}
        return [name for name, p in model.named_parameters() if p in wanted]

    @torch.no_grad()
    def merge(self) -> None:
        """Add the changes to the weights, rounded once to the type that these have.

        What is pruned is ``+0.0``.
        """
        for module in self.layers.values():
            module.frozen.copy_(module.adapted())


@contextmanager
def adapters_on(
    model: nn.Module,
    layers: Sequence[Layer],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
) -> Iterator[Adapters]:
    """Give layers adapters for a while; they change nothing until they are trained.

    Afterwards the model has its own modules and flags again, without a trace of PEFT;
    what was merged stays.

    Args:
        model: The model.
        layers: Matrices of it, each a whole parameter that nothing else uses.
        rank: Rows of A, columns of B.
        alpha: The change is scaled by ``alpha / rank``.
        dropout: Share of what an adapter reads that is set to zero in training.
        seed: Of A at its start; B is zero.
    """
    names = [layer.name for layer in layers]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # it only divides it
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, names)),
    )
    config._register_custom_module(dict.fromkeys(MATRICES, AdaptedLayer))
    with ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        undo.callback(vars(model).pop, "peft_config", None)
        for name in names:
            undo.callback(model.set_submodule, name, model.get_submodule(name))
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            LoraModel(model, config, _NAME)
        placed = {}
        for layer in layers:
            module = model.get_submodule(layer.name)
            assert isinstance(module, AdaptedLayer)
            placed[layer] = module
        yield Adapters(placed)
