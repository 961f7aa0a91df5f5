"""What recovery minimises: the task's loss, and the distance from the dense model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import ConfigError, ModelError
from autoprune.models.task import Batch, Task, output_layer
from autoprune.training.head_loss import DenseOutputs, head_loss, narrowed

EPSILON = 1e-6
"""Keeps SquareHead finite where the dense model's hidden states are zero."""


@dataclass(frozen=True)
class LossWeights:
    """How much each term counts, from 0; all but the first need the dense model.

    ``LossWeights(task=1, divergence=1, hidden=1)`` is the sum that recovers best on few
    tokens (arXiv:2310.06927, Sec. 2).

    Attributes:
        task: Of the task's cross entropy, in nats a position.
        divergence: Of KL(dense || compressed), in nats a position, with both logits
            divided by ``temperature``; times its square, so that gradients keep their
            size (Hinton et al., arXiv:1503.02531, Sec. 2).
        hidden: Of SquareHead: the squared error of what blocks give over the mean
            square of what the dense model's give, added up over the blocks.
        l1: Of the sizes of all trained weights with two axes or more, added up. It
            needs no dense model.
        temperature: What logits are divided by in ``divergence``.

    Raises:
        ConfigError: If a weight is negative, all are 0, or the temperature is not
            positive.
    """

    task: float = 1.0
    divergence: float = 0.0
    hidden: float = 0.0
    l1: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        terms = {
            "task": self.task,
            "divergence": self.divergence,
            "hidden": self.hidden,
            "l1": self.l1,
        }
        for name, weight in terms.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(
                    f"the loss weight {name} is 0 or more, found {weight}"
                )
        if not self.task + self.divergence + self.hidden:
            raise ConfigError(
                "a loss needs a weight above 0 for task, divergence or hidden, found 0 "
                "for all three"
            )
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"the temperature of a distillation is above 0, found "
                f"{self.temperature}"
            )

    @property
    def distils(self) -> bool:
        """Whether the dense model is needed."""
        return self.divergence > 0 or self.hidden > 0


@dataclass(frozen=True, eq=False)
class Losses:
    """What one batch costs.

    Attributes:
        total: What is minimised; carries the gradient.
        terms: Each term before its weight, without gradient; 0 for one that is not
            asked for.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]


class RecoveryLoss:
    """The loss of a model in recovery.

    Losses that a model adds by itself, as for the balance of a router, are left out.
    On the CPU under autocast to bfloat16 the head's products have bfloat16 factors and
    float32 sums; logits are float32 always.

    Args:
        task: What the model is for.
        tokenizer: The model's tokenizer.
        weights: Of the terms.
        teacher: The dense model, a second one in evaluation mode, never trained; None
            if no term needs it.
        blocks: Paths of the blocks whose hidden states are compared.

    Raises:
        ConfigError: If a term needs the dense model, or blocks, and there are none.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        *,
        weights: LossWeights = LossWeights(),  # noqa: B008 - it is frozen
        teacher: nn.Module | None = None,
        blocks: Sequence[str] = (),
    ) -> None:
        if weights.distils and teacher is None:
            raise ConfigError(
                "distillation needs the dense model beside the compressed one, found "
                f"none; its weights are divergence {weights.divergence} and hidden "
                f"{weights.hidden}. Give a teacher, or set both to 0."
            )
        if weights.hidden and not blocks:
            raise ConfigError(
                f"the loss weight hidden is {weights.hidden}, but there are no blocks "
                "whose hidden states could be compared. Name them, or set it to 0."
            )
        self.task = task
        self.tokenizer = tokenizer
        self.weights = weights
        self.teacher = teacher if weights.distils else None
        self.blocks = tuple(blocks) if weights.hidden else ()

    def __call__(self, model: nn.Module, ids: Int[Tensor, "windows length"]) -> Losses:
        """Give the mean loss of some windows, ready for a backward pass.

        Raises:
            ModelError: If the dense model is this very model, or has another head.
        """
        batch = self.task.batch(ids, self.tokenizer)
        dense, wanted = self._teach(model, batch)
        errors: list[Tensor] = []

        def compare(hidden: Tensor) -> None:
            errors.append(square_head(hidden, wanted[len(errors)]))

        with _hearing(model, self.blocks, compare):
            features = self.task.features(model, batch)
        value, entropy, divergence = head_loss(
            self.task,
            model,
            features,
            batch.labels,
            weights=(self.weights.task, self.weights.divergence),
            temperature=self.weights.temperature,
            dense=dense if self.weights.divergence else None,
        )
        none = torch.zeros((), device=features.device)
        hidden = torch.stack(errors).sum() if errors else none
        size = _size_of(model) if self.weights.l1 else none
        total = value + self.weights.hidden * hidden + self.weights.l1 * size
        terms = {
            "task": entropy,
            "divergence": divergence,
            "hidden": hidden.detach(),
            "l1": size.detach(),
        }
        return Losses(total, terms)

    @torch.no_grad()
    def quality(
        self, model: nn.Module, ids: Int[Tensor, "windows length"]
    ) -> Float[Tensor, " positions"]:
        """Give the task's loss at each scored position, in nats; no gradient."""
        batch = self.task.batch(ids, self.tokenizer)
        features = narrowed(self.task.features(model, batch))
        labels = batch.labels.to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            return self.task.head(model).losses(features, labels)

    @torch.no_grad()
    def _teach(
        self, model: nn.Module, batch: Batch
    ) -> tuple[DenseOutputs | None, list[Tensor]]:
        """Run the dense model: what its head reads, and what its blocks give."""
        if self.teacher is None:
            return None, []
        if self.teacher is model:
            raise ModelError(
                "a model cannot be its own dense model: it would learn from what it "
                "has become. Load the dense one beside it."
            )
        hidden: list[Tensor] = []
        with _hearing(self.teacher, self.blocks, hidden.append):
            features = self.task.features(self.teacher, batch)
        head, own = self.task.head(self.teacher), output_layer(model).weight
        if head.weight.shape[0] != own.shape[0]:
            raise ModelError(
                f"the dense model's head has {head.weight.shape[0]} classes, the "
                f"compressed one's {own.shape[0]}; they cannot be compared"
            )
        return DenseOutputs(narrowed(features), head), hidden


def square_head(
    hidden: Float[Tensor, "..."], dense: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Give the squared error of hidden states over the dense ones' mean square.

    SquareHead of Kurtic et al. (arXiv:2310.06927, Eq. 2): whatever the size of a
    block's hidden states, all blocks count alike.
    """
    dense = dense.float()
    error = functional.mse_loss(hidden.float(), dense)
    return error / (dense.square().mean() + EPSILON)


def _size_of(model: nn.Module) -> Float[Tensor, ""]:
    """Add up the sizes of all trained weights: no biases, no gains of norms."""
    sizes = [
        parameter.abs().sum()
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.dim() > 1
    ]
    return torch.stack(sizes).sum() if sizes else torch.zeros(())


@contextmanager
def _hearing(
    model: nn.Module, blocks: Sequence[str], hear: Callable[[Tensor], Any]
) -> Iterator[None]:
    """Hand on what each block gives, in their order, for a while."""

    def on_output(_: nn.Module, __: Any, output: Any) -> None:
        hear(output[0] if isinstance(output, tuple) else output)

    modules = [model.get_submodule(path) for path in blocks]
    handles = [module.register_forward_hook(on_output) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
