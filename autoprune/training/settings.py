"""How long, how fast and in which order a model is trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Int
from torch import Tensor

from autoprune.errors import ConfigError, unknown_name

SCHEDULES = {
    "constant": "constant_with_warmup",
    "cosine": "cosine",
    "linear": "linear",
}
"""Courses of the learning rate after its warm-up, with what transformers calls them."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a recovery is done; the same settings give the same weights.

    Attributes:
        tokens: Budget, never exceeded; it counts every token of every window trained
            on, at each time that it is.
        learning_rate: The largest, after the warm-up.
        schedule: One of ``SCHEDULES``; ``cosine`` and ``linear`` go down to 0.
        warmup: Share of the steps in which the learning rate rises from 0.
        batch: Windows that pass the model at a time.
        accumulation: Batches whose gradients one step of the optimizer takes.
        weight_decay: Of AdamW, on all but biases and norms (arXiv:1711.05101).
        clip: Norm to which gradients are clipped; 0 for none.
        mixed_precision: True computes in bfloat16 where autocast does; weights, their
            gradients and the optimizer are float32 in any case.
        seed: Of the order of windows and of dropout.
        checkpoint_every: Steps between two checkpoints.
        validate_every: Steps between two validations.
        target: Validation loss, in nats, at which to stop; None for no such.
        patience: Validations without a new best loss after which to stop; None for no
            such.

    Raises:
        ConfigError: If a setting is out of its range; names it.
    """

    tokens: int
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    batch: int = 8
    accumulation: int = 1
    weight_decay: float = 0.0
    clip: float = 1.0
    mixed_precision: bool = False
    seed: int = 0
    checkpoint_every: int = 100
    validate_every: int = 100
    target: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                unknown_name("learning rate schedule", self.schedule, SCHEDULES)
            )
        for field in fields(self):
            value = getattr(self, field.name)
            least, most = _RANGES.get(field.name, (-math.inf, math.inf))
            if not isinstance(value, str | None) and not least <= value <= most:
                most_told = "up" if most == math.inf else f"to {most}"
                raise ConfigError(
                    f"{field.name} of a training is from {least} {most_told}, found "
                    f"{value}"
                )
        if self.learning_rate == 0:
            raise ConfigError("a learning rate of 0 trains nothing; give one above 0")

    def steps(self, length: int) -> int:
        """Count the steps of the optimizer that the tokens are enough for.

        Args:
            length: Tokens of a window.

        Raises:
            ConfigError: If they are not enough for one.
        """
        needed = self.batch * self.accumulation * length
        if self.tokens < needed:
            raise ConfigError(
                f"{self.tokens} tokens are not enough for one step of {self.batch} x "
                f"{self.accumulation} windows of {length}, which takes {needed}. Give "
                "more tokens, or a smaller batch or accumulation."
            )
        return self.tokens // needed

    def order(self, windows: int, steps: int) -> Int[Tensor, " taken"]:
        """Tell which window is taken when: each once a pass, shuffled in every pass.

        Args:
            windows: How many there are.
            steps: Of the optimizer.
        """
        count = steps * self.accumulation * self.batch
        generator = torch.Generator().manual_seed(self.seed)
        passes = [
            torch.randperm(windows, generator=generator)
            for _ in range(math.ceil(count / windows))
        ]
        return torch.cat(passes)[:count]

    def stops(self, losses: Sequence[float]) -> str | None:
        """Tell why a training ends before its budget; None if it goes on.

        Args:
            losses: Of all validations until now, the start's first.
        """
        if self.target is not None and losses and losses[-1] <= self.target:
            return "target"
        if self.patience is not None and losses:
            best = min(range(len(losses)), key=losses.__getitem__)
            if len(losses) - 1 - best >= self.patience:
                return "patience"
        return None


_RANGES: dict[str, tuple[float, float]] = {
    "tokens": (1, math.inf),
    "learning_rate": (0, 10),
    "warmup": (0, 1),
    "batch": (1, math.inf),
    "accumulation": (1, math.inf),
    "weight_decay": (0, 10),
    "clip": (0, math.inf),
    "seed": (0, 2**32 - 1),  # the most that numpy takes
    "checkpoint_every": (1, math.inf),
    "validate_every": (1, math.inf),
    "patience": (1, math.inf),
}
