"""DSnoT: moves what an earlier step has pruned, without training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.storage import BITMAP, Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer

SPREAD_FLOOR = 1e-6
"""Least variance of an input, over its mean square: a constant input has none."""


class DynamicSparseNoTraining(CompressionMethod):
    """Swap kept and pruned weights until the mean output of each row is right again.

    Stands after a pruning step: ``wanda(sparsity=0.6) + dsnot``. What a row's output
    lacks on average, over all tokens, is the sum of its pruned weights times the means
    of their inputs. Every cycle brings back the weight of the right sign with the
    largest ``|w * mean| / variance``, and prunes the kept weight with the smallest
    Wanda score among those whose loss also helps. A row is done when its error changes
    sign or is below ``threshold``. In a pattern both lie in one group. What comes back
    has its dense value; kept weights stay as the step before has made them.

    How we differ: a weight moves once at most, and a swap that would leave a larger
    error ends its row undone, so errors of rows never grow. The published code skips
    MLPs by default; here the policy says which layers take the step.
    """

    name = "dsnot"
    reference = "Zhang et al. 2023, Dynamic Sparse No Training, arXiv:2310.08915"
    needs = frozenset({"input_norm", "input_sum"})
    parameters = (
        Parameter("cycles", int, 50, "Most swaps of a row.", 1, 1000),
        Parameter("threshold", float, 0.1, "Error of a row that is left.", 0, 1e6),
    )

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None.

        Unlike methods that prune, it needs a layer that has been pruned.
        """
        reason = preconditions.refuse_without_input(layer)
        if reason:
            return reason
        if previous.bits is not None:
            return f"already quantized to {previous.bits} bits: move the mask before"
        if previous.low_rank is not None:
            return preconditions.LOW_RANK_IS_LAST
        if previous.mask is None:
            return "nothing is pruned yet: write wanda(sparsity=0.6) + dsnot"
        if previous.mask != BITMAP and ":" not in previous.mask:
            return (
                f"single weights cannot move in tiles of {previous.mask}: leave "
                "dsnot out"
            )
        if previous.permuted:
            return (
                f"its {previous.mask} holds in another order of the columns: leave "
                "dsnot out"
            )
        return None

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores: as much as before, in other places."""
        return previous

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        norm = preconditions.finite_input_norm(sources, statistics)
        mean = preconditions.finite_input_mean(sources, statistics)
        square = norm.square() / max(statistics.tokens, 1)
        spread = torch.maximum(square - mean.square(), SPREAD_FLOOR * square)
        inputs = _Inputs(mean, spread, norm)
        return [
            [_refine(source, inputs, one) for one in settings] for source in sources
        ]


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Mean, variance and norm of every input."""

    mean: Float[Tensor, " in"]
    variance: Float[Tensor, " in"]
    norm: Float[Tensor, " in"]


def _refine(source: Source, inputs: _Inputs, settings: Settings) -> Variant:
    mask, pattern = source.variant.mask, source.variant.storage.mask
    if source.dense is None or mask is None:
        lacks = "mask" if mask is None else "dense weight"
        raise MethodError(
            f"dsnot cannot move what is pruned of {source.layer.name} without its "
            f"{lacks}. Let it stand after a step that prunes, in a bank."
        )
    size = mask.shape[1] if pattern == BITMAP else int(str(pattern).partition(":")[2])
    now, dense = preconditions.finite_weight(source), source.dense.float()
    swaps = _Swaps(now, dense, mask, inputs, size)
    swaps.run(settings["cycles"], settings["threshold"])
    weight = torch.where(mask, now, dense)  # of a kept weight the value it had last
    label = None if pattern == BITMAP else pattern
    return source.variant.pruned(weight, swaps.kept, pattern=label)


class _Swaps:
    """The swaps of all rows of a layer, one of each row at a time.

    Args:
        now: Weights as they are; zeros where pruned.
        dense: Weights that may come back.
        mask: What is kept.
        inputs: Statistics of the inputs.
        size: Columns of a group in which a swap stays.

    Attributes:
        kept: What is kept now.
        error: Mean output that each row lacks.
    """

    def __init__(
        self,
        now: Float[Tensor, "out in"],
        dense: Float[Tensor, "out in"],
        mask: Bool[Tensor, "out in"],
        inputs: _Inputs,
        size: int,
    ) -> None:
        self.kept, self.size = mask.clone(), size
        self.back, self.gone = dense * inputs.mean, now * inputs.mean
        self.gain = self.back / inputs.variance.clamp(min=torch.finfo(now.dtype).tiny)
        self.score = now.abs() * inputs.norm
        self.error = (self.back - self.gone).sum(1)
        self.pruned, self.held = ~mask, mask.clone()  # what has not moved yet

    def run(self, cycles: int, threshold: float) -> None:
        """Swap until every row is done."""
        sign = self.error.sign()
        busy = self.error.abs() > threshold
        rows = torch.arange(len(sign))
        for _ in range(cycles):
            if not busy.any():
                return
            grown, dropped, possible = self._choose(sign)
            after = self.error - self.back[rows, grown] + self.gone[rows, dropped]
            busy &= possible & (after.abs() < self.error.abs())
            at, grow, drop = rows[busy], grown[busy], dropped[busy]
            self.kept[at, grow], self.kept[at, drop] = True, False
            self.pruned[at, grow] = self.held[at, drop] = False
            self.error = torch.where(busy, after, self.error)
            busy &= (self.error.abs() > threshold) & (self.error.sign() == sign)

    def _choose(
        self, sign: Float[Tensor, " out"]
    ) -> tuple[Int[Tensor, " out"], Int[Tensor, " out"], Bool[Tensor, " out"]]:
        """Choose what comes back, what goes, and whether a row has both."""
        toward = sign[:, None]
        helps = self.held & (self.gone * toward < 0)
        costs = torch.where(helps, self.score, torch.inf)
        costs = costs.view(len(sign), -1, self.size)
        least, which = costs.min(2)
        gains = torch.where(self.pruned, self.gain * toward, -torch.inf)
        groups = gains.view_as(costs)
        groups = groups.masked_fill(least.isinf()[:, :, None], -torch.inf)
        gain, grown = groups.flatten(1).max(1)
        group = (grown // self.size)[:, None]
        dropped = group * self.size + which.gather(1, group)
        return grown, dropped[:, 0], gain > 0


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [DynamicSparseNoTraining()]
