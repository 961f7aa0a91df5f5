"""How far a compressed model is from the dense one, on the same tokens.

The divergence is KL(dense || compressed) per token. Of the dense model only its final
vectors are kept, not its logits. With ``p`` the probabilities that the dense model
gives from its vector ``d`` and its head ``W``, and ``h`` and ``V`` those of the
compressed one (``V`` is ``W`` unless the head itself is compressed)::

    KL = (sum p W) d  -  (sum p V) h  +  logsumexp(V h + b)  -  logsumexp(W d + b)

``sum p V`` and what depends on ``d`` do not change between policies: one vector of the
hidden size and a number per token, for each of the few states of the head. A policy
then costs a product with the head and one ``logsumexp``; no distribution is formed.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.evaluation.heads import check_head, same_head, stamp_of
from autoprune.evaluation.quality import Quality
from autoprune.evaluation.teacher_cache import Remembered, TeacherCache
from autoprune.models.prefix import Prefix
from autoprune.models.statistics import exact_products
from autoprune.models.task import Batch, Head, Task
from autoprune.models.text import TokenWindows

HEADS = 4
"""States of the head that are remembered beside the dense one: its variants are few."""


@dataclass(eq=False)
class _HeadState:
    """A head as it once stood on the model, and what dense outputs expect of it."""

    head: Head
    stamp: tuple[int, int]
    expected: dict[int, Float[Tensor, "positions hidden"]]  # sum p W, by window


class Teacher:
    """The dense model on one split, remembered.

    Args:
        task: What the model is for.
        model: The dense model.
        windows: The split.
        tokenizer: The model's tokenizer.
        batch: Windows that pass the model at a time.
        cache: Where what the dense model made is kept; None for nowhere.

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
        cache: TeacherCache | None = None,
    ) -> None:
        self.task = task
        self.windows = windows
        self.batch = batch
        self._heads = [self._new_state(model)]
        self.head = self._heads[0].head
        with torch.inference_mode():
            check_head(task, model, windows.ids[:1], tokenizer)
            self._all = task.batch(windows.ids, tokenizer)
            counts = self._all.scored.sum(1).tolist()
            self._ends = list(accumulate(counts, initial=0))
            self._know(self._recall(model, cache) if cache else self._remember(model))
        self.dense = self._dense.quality

    def measure(
        self,
        model: nn.Module,
        windows: Sequence[int] | None = None,
        *,
        prefix: Prefix | None = None,
        unchanged: int = 0,
    ) -> Quality:
        """Run a compressed model on windows of the split.

        Args:
            model: The model, with a policy's variants on it.
            windows: Indices of the windows, in the order of the answer; None for all.
            prefix: What another policy left behind its blocks on the same batches.
            unchanged: Leading blocks that are as that policy's; see ``Prefix``.
        """
        found = []
        with torch.inference_mode():
            for part in self.parts(windows):
                name = (self.windows.fingerprint, *part)
                with prefix.reused(model, name, unchanged) if prefix else nullcontext():
                    features = self.task.features(model, self.batch_of(part))
                found.append(self.compare(model, features, part))
        return Quality(*(torch.cat(columns) for columns in zip(*found, strict=True)))

    def measure_first(
        self,
        model: nn.Module,
        windows: int | None,
        known: Quality | None,
        *,
        prefix: Prefix | None = None,
        unchanged: int = 0,
    ) -> Quality:
        """Measure the first windows; only those that are not known already."""
        count = windows or len(self.windows.ids)
        left = range(len(known.kl) if known else 0, count)
        if not left:
            assert known is not None
            return known.first(count)
        found = self.measure(model, left, prefix=prefix, unchanged=unchanged)
        return known + found if known else found

    def parts(self, windows: Sequence[int] | None = None) -> list[list[int]]:
        """Cut windows into batches that pass the model together."""
        every = list(range(len(self.windows.ids)) if windows is None else windows)
        return [every[i : i + self.batch] for i in range(0, len(every), self.batch)]

    def batch_of(self, windows: Sequence[int]) -> Batch:
        """Give some windows as a batch for the model."""
        at, whole = torch.tensor(windows), self._all
        inputs = {
            name: value[at] if isinstance(value, Tensor) else value
            for name, value in whole.inputs.items()
        }
        return Batch(inputs, whole.scored[at], self._rows(whole.labels, windows))

    def compare(
        self,
        model: nn.Module,
        features: Float[Tensor, "positions hidden"],
        windows: Sequence[int],
    ) -> tuple[Float[Tensor, " windows"], Float[Tensor, " windows"]]:
        """Give KL and loss of each window, from what the model made of them.

        Args:
            model: The model, for its head as it stands now.
            features: What its head reads at the scored positions of the windows.
            windows: Their indices.
        """
        compared = self._compared(self._state_of(model), features, windows)
        kl, nll = (torch.cat(columns) for columns in zip(*compared, strict=True))
        counts = [self._ends[w + 1] - self._ends[w] for w in windows]
        return _means(kl, counts), _means(nll, counts)

    def pull(
        self,
        model: nn.Module,
        features: Float[Tensor, "positions hidden"],
        windows: Sequence[int],
        *,
        head: bool = False,
    ) -> tuple[
        Float[Tensor, "positions hidden"], Float[Tensor, "classes hidden"] | None
    ]:
        """Give the gradient of the mean KL of some windows with respect to features.

        Args:
            model: The model, for its head as it stands now.
            features: What its head reads; its graph is not touched.
            windows: Their indices.
            head: Also give the gradient with respect to the head's weight.
        """
        state = self._state_of(model)
        leaf = features.detach().requires_grad_()
        if head:
            weight = state.head.weight.detach().requires_grad_()
            state = replace(state, head=replace(state.head, weight=weight))
        counts = [self._ends[w + 1] - self._ends[w] for w in windows]
        share = torch.cat([torch.full((n,), 1 / n / len(counts)) for n in counts])
        done = 0
        with torch.enable_grad(), exact_products(features):
            # Chunk by chunk: no more than one chunk's logits exist at a time.
            for kl, _ in self._compared(state, leaf, windows):
                (kl * share[done : done + len(kl)]).sum().backward()
                done += len(kl)
        assert leaf.grad is not None
        return leaf.grad, state.head.weight.grad if head else None

    def _rows(self, of: Tensor, windows: Sequence[int]) -> Tensor:
        """Take the positions of some windows."""
        return torch.cat([of[self._ends[w] : self._ends[w + 1]] for w in windows])

    def _new_state(self, model: nn.Module) -> _HeadState:
        # Gradients are taken later of what a measurement saw first.
        with torch.inference_mode(False):
            head = self.task.head(model)
            # A copy: a float32 head is the model's own weight, which policies write to.
            head = replace(head, weight=head.weight.clone())
        return _HeadState(head, stamp_of(model), {})

    def _state_of(self, model: nn.Module) -> _HeadState:
        """Give the state of the head, remembered if it has stood there before."""
        stamp = stamp_of(model)
        for state in self._heads:
            if state.stamp == stamp:
                return state
        found = self._new_state(model)
        for state in self._heads:
            if same_head(found.head, state.head):
                state.stamp = stamp
                return state
        self._heads = [self._heads[0], *self._heads[1:][1 - HEADS :], found]
        return found

    def _recall(self, model: nn.Module, cache: TeacherCache) -> Remembered:
        dtype = next(model.parameters()).dtype
        key = cache.key(self.task, self._all, dtype=dtype, batch=self.batch)
        return cache.get(key, lambda: self._remember(model))

    def _remember(self, model: nn.Module) -> Remembered:
        """Run the dense model, and compare it with itself."""
        features, expected, cross, log_sum = [], [], [], []
        for part in self.parts():
            features.append(self.task.features(model, self.batch_of(part)))
            for rows, logits in self.head.in_chunks(features[-1]):
                expected.append(logits.softmax(-1) @ self.head.weight)
                # The same operations as for a policy: their rounding errors cancel,
                # and the dense model is at KL 0 exactly.
                cross.append(_cross(expected[-1], features[-1][rows], self.head))
                log_sum.append(logits.logsumexp(-1))
        unknown = torch.empty(0)
        read, mean = torch.cat(features), torch.cat(expected)
        also = torch.cat(cross), torch.cat(log_sum), unknown, unknown
        self._know(Remembered(read, mean, *also))
        compared = [self.compare(model, self._rows(read, p), p) for p in self.parts()]
        kl, nll = map(torch.cat, zip(*compared, strict=True))
        return replace(self._dense, kl=kl, nll=nll)

    def _know(self, dense: Remembered) -> None:
        self._dense = dense
        self._keep(self._heads[0], range(len(self.windows.ids)), dense.expected)

    def _keep(self, state: _HeadState, windows: Sequence[int], means: Tensor) -> None:
        counts = [self._ends[w + 1] - self._ends[w] for w in windows]
        state.expected |= zip(windows, torch.split(means, counts), strict=True)

    def _expected(self, state: _HeadState, windows: Sequence[int]) -> Tensor:
        """Give ``sum p W`` of some windows for a state of the head; computed once."""
        new = [window for window in windows if window not in state.expected]
        if new:
            with torch.no_grad():
                logits = self.head.in_chunks(self._rows(self._dense.features, new))
                means = [z.softmax(-1) @ state.head.weight for _, z in logits]
                self._keep(state, new, torch.cat(means))
        return torch.cat([state.expected[window] for window in windows])

    def _compared(
        self, state: _HeadState, features: Tensor, windows: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Give KL and loss of each position, chunk by chunk."""
        # The remembered products stand for the head's weight, but not for its gradient.
        linear = state.head.softcap is None and not state.head.weight.requires_grad
        labels = self._rows(self._all.labels, windows)
        dense_log_sum = self._rows(self._dense.log_sum, windows)
        dense_cross = self._rows(self._dense.cross, windows)
        if linear:
            expected = self._expected(state, windows)
        else:
            dense = self._rows(self._dense.features, windows)
        for rows, logits in state.head.in_chunks(features):
            log_sum = logits.logsumexp(-1)
            nll = log_sum - logits.gather(1, labels[rows, None])[:, 0]
            if linear:
                cross = _cross(expected[rows], features[rows], state.head)
                kl = dense_cross[rows] - cross + (log_sum - dense_log_sum[rows])
            else:
                with exact_products(features):
                    log_p = self.head.logits(dense[rows]).log_softmax(-1)
                log_q = logits - log_sum[:, None]
                kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            yield kl, nll


def _means(values: Tensor, counts: list[int]) -> Tensor:
    return torch.stack([part.mean() for part in torch.split(values, counts)])


def _cross(mean: Tensor, features: Tensor, head: Head) -> Tensor:
    """Give ``(sum p W) h``, with the head's factor of the logits."""
    return (mean * features.float()).sum(-1) * head.scale
