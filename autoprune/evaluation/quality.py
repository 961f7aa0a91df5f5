"""How far a compressed model is from the dense one, on the same tokens.

The divergence is KL(dense || compressed) per token. Of the dense model only its final
vectors are kept, not its logits. With a linear head shared by both, logits
``z = W h + b``, and the probabilities ``p`` of the dense model, whose vector is ``d``::

    KL = (sum p W) (d - h)  +  logsumexp(W h + b)  -  logsumexp(W d + b)

``sum p W`` and what depends on ``d`` do not change between policies: one vector of the
hidden size and a number per token. A policy then costs one product with the head and
one ``logsumexp``, and no distribution is ever formed; the value is the same.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.statistics import matmul_precision
from autoprune.models.task import Batch, Head, Task, output_layer
from autoprune.models.text import TokenWindows

CHUNK = 64
"""Positions whose logits exist at a time: 12 MB at 49 k words stay near the cache."""


_CHECKED = 16
_HEAD_AGREEMENT = 0.02
"""Largest difference of logits, over the largest logit: rounding to bfloat16."""


@dataclass(frozen=True, eq=False)
class Quality:
    """Divergence and loss of one policy, window by window.

    Attributes:
        kl: Mean KL to the dense model of each window, in nats a token.
        nll: Mean negative log-likelihood of each window's labels, in nats a token.
    """

    kl: Float[Tensor, " windows"]
    nll: Float[Tensor, " windows"]

    @property
    def mean_kl(self) -> float:
        """KL to the dense model, in nats a token."""
        return float(self.kl.double().mean())

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood; inf where it overflows."""
        return float(self.nll.double().mean().exp())

    def kl_error(self) -> float:
        """Standard error of the mean KL over windows; NaN for one window."""
        count = len(self.kl)
        return float(self.kl.double().std() / count**0.5) if count > 1 else math.nan


@dataclass(frozen=True, eq=False)
class _Remembered:
    """A batch, and what the dense model made of it."""

    batch: Batch
    features: Float[Tensor, "positions hidden"]
    expected: Float[Tensor, "positions hidden"]  # sum p W
    cross: Float[Tensor, " positions"]  # (sum p W) d
    log_sum: Float[Tensor, " positions"]  # logsumexp(W d + b)


class Teacher:
    """The dense model on one split, remembered.

    Args:
        task: What the model is for.
        model: The dense model.
        windows: The split.
        tokenizer: The model's tokenizer.
        batch: Windows that pass the model at a time.

    Attributes:
        dense: The dense model's own quality: KL 0, and its loss.

    Raises:
        ModelError: If the model does more to its logits than the task knows.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        windows: TokenWindows,
        *,
        tokenizer: Any,
        batch: int = 8,
    ) -> None:
        self.task = task
        self.windows = windows
        head = task.head(model)
        # A copy: a float32 head is the model's own weight, which policies write to.
        self.head = replace(head, weight=head.weight.clone())
        self._head_as = _stamp(model)
        with torch.inference_mode():
            _check_head(task, model, task.batch(windows.ids[:1, :_CHECKED], tokenizer))
            self._parts = [
                self._remember(model, task.batch(ids, tokenizer))
                for ids in torch.split(windows.ids, batch)
            ]
        self.dense = self.measure(model)

    def measure(self, model: nn.Module, windows: int | None = None) -> Quality:
        """Run a compressed model on the split.

        Args:
            model: The model, with a policy's variants on it.
            windows: How many windows, counted from the first; None for all.
        """
        with torch.inference_mode():
            head, same = self._head_of(model)
            linear = same and head.softcap is None
            pieces, left = [], windows or len(self.windows.ids)
            for part in self._parts:
                if left <= 0:
                    break
                part = _first(part, left)
                left -= len(part.batch.scored)
                features = self.task.features(model, part.batch)
                pieces.append(self._compare(part, features, head, linear=linear))
            kl, nll = (torch.cat(columns) for columns in zip(*pieces, strict=True))
        return Quality(kl, nll)

    def _head_of(self, model: nn.Module) -> tuple[Head, bool]:
        """Give a model's head, and whether it still is the dense one's."""
        if _stamp(model) == self._head_as:
            return self.head, True
        head = self.task.head(model)
        return head, _same(head, self.head)

    def _remember(self, model: nn.Module, batch: Batch) -> _Remembered:
        features = self.task.features(model, batch)
        expected, cross, log_sum = [], [], []
        for rows, logits in _logits(self.head, features):
            mean = logits.softmax(-1) @ self.head.weight
            expected.append(mean)
            # The same operations as for a policy: their rounding errors cancel, and
            # the dense model is at KL 0 exactly.
            cross.append(_cross(mean, features[rows], self.head))
            log_sum.append(logits.logsumexp(-1))
        columns = (torch.cat(column) for column in (expected, cross, log_sum))
        return _Remembered(batch, features, *columns)

    def _compare(
        self, part: _Remembered, features: Tensor, head: Head, *, linear: bool
    ) -> tuple[Tensor, Tensor]:
        """Give KL and loss of each window of a batch."""
        kl, nll = [], []
        for rows, logits in _logits(head, features):
            log_sum = logits.logsumexp(-1)
            labels = part.batch.labels[rows]
            nll.append(log_sum - logits.gather(1, labels[:, None])[:, 0])
            if linear:
                cross = _cross(part.expected[rows], features[rows], head)
                kl.append(part.cross[rows] - cross + (log_sum - part.log_sum[rows]))
            else:
                with _precision(features):
                    log_p = self.head.logits(part.features[rows]).log_softmax(-1)
                log_q = logits - log_sum[:, None]
                kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        counts = part.batch.scored.sum(1).tolist()
        return tuple(
            torch.stack([x.mean() for x in torch.split(torch.cat(values), counts)])
            for values in (kl, nll)
        )  # type: ignore[return-value]


def _cross(mean: Tensor, features: Tensor, head: Head) -> Tensor:
    """Give ``(sum p W) h``, with the head's factor of the logits."""
    return (mean * features.float()).sum(-1) * head.scale


def _check_head(task: Task, model: nn.Module, batch: Batch) -> None:
    """Hold that the head gives the model's own logits, on a few positions."""
    expected = model(**batch.inputs).logits[batch.scored].float()
    found = task.head(model).logits(task.features(model, batch))
    difference = float((found - expected).abs().max() / expected.abs().max())
    if difference > _HEAD_AGREEMENT:
        raise ModelError(
            f"{type(model).__name__} makes its logits in a way that task {task.name!r} "
            f"does not know: those of its output layer differ by {difference:.1%}. "
            "Bring a task of your own with the hook register_tasks"
        )


def _logits(head: Head, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Give the logits of all positions in chunks, each with its rows."""
    for start in range(0, len(features), CHUNK):
        rows = slice(start, start + CHUNK)
        with _precision(features):
            logits = head.logits(features[rows])
        yield rows, logits


def _precision(features: Tensor) -> Any:
    """Multiply as the features were made: bfloat16 factors lose nothing by it."""
    return matmul_precision("bf16" if features.dtype == torch.bfloat16 else "ieee")


def _first(part: _Remembered, windows: int) -> _Remembered:
    """Keep the first windows of a batch."""
    if windows >= len(part.batch.scored):
        return part
    scored = part.batch.scored[:windows]
    count = int(scored.sum())
    inputs = {
        name: value[:windows] if isinstance(value, Tensor) else value
        for name, value in part.batch.inputs.items()
    }
    return _Remembered(
        Batch(inputs, scored, part.batch.labels[:count]),
        part.features[:count],
        part.expected[:count],
        part.cross[:count],
        part.log_sum[:count],
    )


def _stamp(model: nn.Module) -> tuple[int, int]:
    """Name the state of the head's weight: writing to it raises its version."""
    weight = output_layer(model).weight
    return id(weight), weight._version


def _same(one: Head, other: Head) -> bool:
    """Tell whether a head still is the dense model's."""
    return torch.equal(one.weight, other.weight) and (
        one.bias is None or other.bias is None or torch.equal(one.bias, other.bias)
    )
