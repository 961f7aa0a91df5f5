"""The loss of a model's head, and its gradient, without the logits of all positions.

Those would not fit: 4,096 positions of a vocabulary of 49 k words take 0.8 GB, and
distillation holds several such. So the head runs over some positions at a time, and the
gradient of its loss is taken on the spot; only that is kept, of features and head. The
same is done for cross entropy by Liger-Kernel (arXiv:2410.10989, Sec. 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from autoprune.models.statistics import exact_products
from autoprune.models.task import Head, Task, output_layer

POSITIONS = 256
"""Whose logits exist at a time. More than a measurement takes: the gradient of a head
that is trained is added up once for each of these pieces, and it is large."""


@dataclass(frozen=True, eq=False)
class DenseOutputs:
    """What the dense model's head reads at the scored positions, and that head."""

    features: Float[Tensor, "positions hidden"]
    head: Head


def head_loss(
    task: Task,
    model: nn.Module,
    features: Float[Tensor, "positions hidden"],
    labels: Int[Tensor, " positions"],
    *,
    weights: tuple[float, float] = (1.0, 0.0),
    temperature: float = 1.0,
    dense: DenseOutputs | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Give the loss of a head, its cross entropy and its divergence from a dense one.

    All three are means over positions, in nats. Only the first carries a gradient: to
    the features, and to the head's parameters where they are trained. Logits are
    float32.

    Args:
        task: What the model is for.
        model: The model, for its head.
        features: What the head reads.
        labels: The right classes.
        weights: Of cross entropy and of divergence in the loss.
        temperature: What both logits are divided by in the divergence, which is then
            multiplied by its square.
        dense: What to diverge from; without it the divergence is 0.
    """
    layer = output_layer(model)
    ask = _Ask(labels.to(features.device), task.head(model), temperature, dense)
    # Not the head's copies but the parameters, which may be trained.
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    apply: Any = _HeadLoss.apply
    loss, terms = apply(ask, weights, features, *parameters)
    return loss, terms[0], terms[1]


def narrowed(features: Tensor) -> Tensor:
    """Round features as autocast does, so that a head's products are as fast."""
    kind = features.device.type
    if torch.is_autocast_enabled(kind):
        return features.to(torch.get_autocast_dtype(kind))
    return features


@dataclass(frozen=True, eq=False)
class _Ask:
    """What a head is asked for."""

    labels: Int[Tensor, " positions"]
    head: Head
    temperature: float
    dense: DenseOutputs | None

    def terms(self, leaves: Sequence[Tensor], rows: slice) -> Float[Tensor, " 2"]:
        """Add up cross entropy and divergence of some positions.

        Args:
            leaves: Their features, then the head's weight and perhaps its bias.
            rows: Which they are.
        """
        features, weight, *bias = leaves
        head = replace(self.head, weight=weight, bias=bias[0] if bias else None)
        logits = head.logits(features)
        entropy = functional.cross_entropy(logits, self.labels[rows], reduction="sum")
        if self.dense is None:
            return torch.stack([entropy, torch.zeros_like(entropy)])
        with torch.no_grad():
            known = self.dense.head.logits(self.dense.features[rows])
            known = (known / self.temperature).log_softmax(-1)
        found = (logits / self.temperature).log_softmax(-1)
        divergence = functional.kl_div(found, known, reduction="sum", log_target=True)
        return torch.stack([entropy, divergence * self.temperature**2])


class _HeadLoss(torch.autograd.Function):
    """Takes the gradient on the way forward, piece by piece."""

    @staticmethod
    def forward(
        ctx: Any, ask: _Ask, weights: tuple[float, float], *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        need = ctx.needs_input_grad[2:]
        narrow, count = narrowed(parts[0]), len(ask.labels)
        by = torch.tensor(weights, dtype=torch.float32, device=narrow.device)
        terms = torch.zeros(2, device=narrow.device)
        ctx.found = [
            torch.zeros_like(part) if needed else None
            for part, needed in zip(parts, need, strict=True)
        ]
        with (
            torch.autocast(narrow.device.type, enabled=False),
            exact_products(narrow),
            torch.set_grad_enabled(any(need)),
        ):
            for start in range(0, count, POSITIONS):
                rows = slice(start, start + POSITIONS)
                leaves = [narrow[rows].detach(), *(p.float() for p in parts[1:])]
                leaves = [
                    leaf.detach().requires_grad_(needed)
                    for leaf, needed in zip(leaves, need, strict=True)
                ]
                piece = ask.terms(leaves, rows) / count
                terms += piece.detach()
                _add_gradients(ctx.found, (by * piece).sum(), leaves, rows)
        ctx.mark_non_differentiable(terms)
        return (by * terms).sum(), terms

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The loss is one number, and so is what comes from above.
        found = [None if g is None else g * upstream[0] for g in ctx.found]
        return (None, None, *found)


def _add_gradients(
    found: Sequence[Tensor | None],
    value: Tensor,
    leaves: Sequence[Tensor],
    rows: slice,
) -> None:
    """Add the gradient of a piece's value to what was found for the pieces before."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    new = iter(torch.autograd.grad(value, wanted) if wanted else ())
    for index, total in enumerate(found):
        if total is not None:
            (total if index else total[rows]).add_(next(new))
