"""How far a compressed model is from the dense one, on the same tokens.

The divergence is KL(dense || compressed) per token. Of the dense model only its final
vectors are kept, not its logits. With ``p`` the probabilities that the dense model
gives from its vector ``d`` and its head ``W``, and ``h`` and ``V`` those of the
compressed one (``V`` is ``W`` unless the head itself is compressed)::

    KL = (sum p W) d  -  (sum p V) h  +  logsumexp(V h + b)  -  logsumexp(W d + b)

``sum p V`` and what depends on ``d`` do not change between policies: one vector of the
hidden size and a number per token, for each of the few states of the head. A policy
then costs one product with the head and one ``logsumexp``, and no distribution is ever
formed; the value is the same.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.statistics import exact_products
from autoprune.models.task import Batch, Head, Task, output_layer
from autoprune.models.text import TokenWindows

HEADS = 4
"""States of the head that are remembered beside the dense one: its variants are few."""

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
    cross: Float[Tensor, " positions"]  # (sum p W) d
    log_sum: Float[Tensor, " positions"]  # logsumexp(W d + b)


@dataclass(eq=False)
class _HeadState:
    """A head as it once stood on the model, and what dense outputs expect of it."""

    head: Head
    stamp: tuple[int, int]
    expected: dict[int, Float[Tensor, "positions hidden"]]  # sum p W, by batch


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
        self._heads = [self._new_state(model)]
        self.head = self._heads[0].head
        with torch.inference_mode():
            _check_head(task, model, task.batch(windows.ids[:1, :_CHECKED], tokenizer))
            self._parts = [
                self._remember(number, model, task.batch(ids, tokenizer))
                for number, ids in enumerate(torch.split(windows.ids, batch))
            ]
        self.dense = self.measure(model)

    def measure(self, model: nn.Module, windows: int | None = None) -> Quality:
        """Run a compressed model on the split.

        Args:
            model: The model, with a policy's variants on it.
            windows: How many windows, counted from the first; None for all.
        """
        with torch.inference_mode():
            state = self._state_of(model)
            pieces, left = [], windows or len(self.windows.ids)
            for number, part in enumerate(self._parts):
                if left <= 0:
                    break
                part = _first(part, left)
                left -= len(part.batch.scored)
                features = self.task.features(model, part.batch)
                pieces.append(self._compare(part, features, state, number))
            kl, nll = (torch.cat(columns) for columns in zip(*pieces, strict=True))
        return Quality(kl, nll)

    def _new_state(self, model: nn.Module) -> _HeadState:
        head = self.task.head(model)
        # A copy: a float32 head is the model's own weight, which policies write to.
        head = replace(head, weight=head.weight.clone())
        return _HeadState(head, _stamp(model), {})

    def _state_of(self, model: nn.Module) -> _HeadState:
        """Give the state of the head, remembered if it has stood there before."""
        stamp = _stamp(model)
        for state in self._heads:
            if state.stamp == stamp:
                return state
        found = self._new_state(model)
        for state in self._heads:
            if _same(found.head, state.head):
                state.stamp = stamp
                return state
        self._heads = [self._heads[0], *self._heads[1:][1 - HEADS :], found]
        return found

    def _remember(self, number: int, model: nn.Module, batch: Batch) -> _Remembered:
        features = self.task.features(model, batch)
        expected, cross, log_sum = [], [], []
        for rows, logits in self.head.in_chunks(features):
            mean = logits.softmax(-1) @ self.head.weight
            expected.append(mean)
            # The same operations as for a policy: their rounding errors cancel, and
            # the dense model is at KL 0 exactly.
            cross.append(_cross(mean, features[rows], self.head))
            log_sum.append(logits.logsumexp(-1))
        self._heads[0].expected[number] = torch.cat(expected)
        return _Remembered(batch, features, torch.cat(cross), torch.cat(log_sum))

    def _expected(self, state: _HeadState, number: int) -> Tensor:
        """Give ``sum p W`` of a batch for a state of the head; computed once."""
        if number not in state.expected:
            logits = self.head.in_chunks(self._parts[number].features)
            means = [z.softmax(-1) @ state.head.weight for _, z in logits]
            state.expected[number] = torch.cat(means)
        return state.expected[number]

    def _compare(
        self, part: _Remembered, features: Tensor, state: _HeadState, number: int
    ) -> tuple[Tensor, Tensor]:
        """Give KL and loss of each window of a batch."""
        linear = state.head.softcap is None
        expected = self._expected(state, number) if linear else features
        kl, nll = [], []
        for rows, logits in state.head.in_chunks(features):
            log_sum = logits.logsumexp(-1)
            labels = part.batch.labels[rows]
            nll.append(log_sum - logits.gather(1, labels[:, None])[:, 0])
            if linear:
                cross = _cross(
                    expected[rows][: len(logits)], features[rows], state.head
                )
                kl.append(part.cross[rows] - cross + (log_sum - part.log_sum[rows]))
            else:
                with exact_products(features):
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
