"""What a model says on a few windows of tokens: small, to travel with an export."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from autoprune.models.task import Task

WINDOWS = 4
"""Most windows of a probe."""

POSITIONS = 64
"""Most positions whose log-probabilities are kept, evenly spread."""

CLASSES = 8
"""Log-probabilities kept a position: of the likeliest classes."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A model's outputs on some windows.

    Attributes:
        ids: The windows of tokens.
        perplexity: Over all scored positions.
        classes: The likeliest classes at each position that is kept.
        logprobs: Their log-probabilities, in nats.
        sha256: Of all logits at these positions, in float32.
    """

    ids: list[list[int]]
    perplexity: float
    classes: list[list[int]]
    logprobs: list[list[float]]
    sha256: str

    @classmethod
    def take(
        cls,
        task: Task,
        model: nn.Module,
        tokenizer: Any,
        ids: Int[Tensor, "windows length"],
        *,
        classes: list[list[int]] | None = None,
    ) -> Self:
        """Run a model.

        Args:
            task: What the model is for.
            model: The model.
            tokenizer: Its tokenizer.
            ids: Windows; the first ones are used.
            classes: Whose log-probabilities to keep; the likeliest by default.
        """
        ids = ids[:WINDOWS]
        with torch.inference_mode():
            batch = task.batch(ids, tokenizer)
            features, head = task.features(model, batch), task.head(model)
            mean = head.losses(features, batch.labels).double().mean()
            count = min(POSITIONS, len(features))
            places = torch.linspace(0, len(features) - 1, count).long()
            logits = head.logits(features[places]).cpu()
        logprobs = logits.log_softmax(-1)
        kept = (
            logprobs.topk(min(CLASSES, logprobs.shape[1])).indices
            if classes is None
            else torch.tensor(classes)
        )
        told = logprobs.gather(1, kept)
        sha256 = hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()
        return cls(
            ids.tolist(), float(mean.exp()), kept.tolist(), told.tolist(), sha256
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read it from plain data; a null stands for what is not finite."""
        rows = [[_number(value) for value in row] for row in data["logprobs"]]
        perplexity = _number(data["perplexity"])
        return cls(**{**data, "logprobs": rows, "perplexity": perplexity})

    def to_dict(self) -> dict[str, Any]:
        """Write it as plain data, ready for JSON."""
        return asdict(self)

    def distance(self, other: "Probe") -> float:
        """Tell the largest difference of a log-probability; NaN agrees with NaN."""
        mine, others = torch.tensor(self.logprobs), torch.tensor(other.logprobs)
        if mine.shape != others.shape:
            return math.inf
        gap: Float[Tensor, "positions classes"] = (mine - others).abs()
        gap[mine.isnan() & others.isnan()] = 0
        return float(gap.nan_to_num(nan=math.inf).max())


def _number(value: float | None) -> float:
    return math.nan if value is None else value
