"""RIA: how much of its row and of its column a weight is, times its input.

With ``permute`` the columns may first change places, so that what is important spreads
over the groups of an ``N:M`` pattern instead of competing within one.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.masks import kept_by_pattern
from autoprune.compression.method import (
    CompressionMethod,
    Parameter,
    Settings,
    Source,
    keep_of,
)
from autoprune.compression.permuting import refuse_permuting
from autoprune.compression.scoring import BY_LAYER, ScoringMethod
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value

SWEEPS = 10
"""Most sweeps over the places of a group while an order is improved."""

LEAST_GAIN = 1e-4
"""A sweep that keeps so little more, relatively, is the last one: 3 sweeps and 3 s for
576 by 1536 weights (measured on one thread)."""

Scores = Float[Tensor, "out in"]


class Ria(ScoringMethod):
    """Remove by relative importance and activations: so that no channel dies out.

    A weight counts as its part of the sizes in its column plus its part of those in
    its row, times the norm of its input to the power of ``power``. All weights of a
    layer compete by default.

    ``permute`` looks for an order of the columns in which an N:M pattern keeps more
    (channel permutation: heuristic allocation, then linear sum assignment). It costs
    nothing at run time only where the order can be folded into the rows that make the
    columns: in the layer that takes the channels of an MLP. Others refuse it. A search
    sees a mask in the model's own order; exporters store the order or fold it.

    How we differ: counts are exact. The order is improved until it hardly gains, and
    never keeps less than the layer's own.
    """

    name = "ria"
    reference = "Zhang et al. 2024, Plug-and-Play Post-Training Pruning, ICLR"
    needs = frozenset({"input_norm"})
    parameters = (
        *BY_LAYER,
        Parameter("power", float, 0.5, "Power of the norm of the input.", 0, 2),
        Parameter("permute", bool, False, "Let columns change groups of a pattern."),
    )

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters."""
        settings = super().check(params)
        if settings["permute"] and settings["pattern"] is None:
            raise MethodError(
                "ria(permute=true) needs a pattern, found none: only in an N:M pattern "
                "do columns compete in groups. Write ria(pattern=2:4, permute=true)."
            )
        return settings

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        reason = super().refuses(layer, previous, settings)
        if reason or not settings["permute"]:
            return reason
        return refuse_permuting(layer)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        plain = [one for one in settings if not one["permute"]]
        made = []
        found = super().compress(sources, statistics, plain)
        for source, variants in zip(sources, found, strict=True):
            rest = iter(variants)
            made.append(
                [
                    self._permuted(source, statistics, one)
                    if one["permute"]
                    else next(rest)
                    for one in settings
                ]
            )
        return made

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Score every weight."""
        norm = preconditions.finite_input_norm([source], statistics)
        parts = relative_importance(preconditions.finite_weight(source))
        return parts * norm.pow(settings["power"])

    def _permuted(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Variant:
        scores, pattern = self.scores(source, statistics, settings), settings["pattern"]
        order = best_order(scores, pattern)
        kept = kept_by_pattern(scores[:, order], pattern)[:, order.argsort()]
        weight = source.variant.weight
        return source.variant.pruned(weight, kept, pattern=pattern, order=order)


def relative_importance(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Give each weight's part of its column plus its part of its row.

    Example:
        >>> relative_importance(torch.tensor([[1.0, -1.0], [3.0, 0.0]]))
        tensor([[0.7500, 1.5000],
                [1.7500, 0.0000]])
    """
    sizes = weight.abs()
    tiny = torch.finfo(sizes.dtype).tiny  # rows and columns of zeros have no parts
    columns = sizes.sum(0, keepdim=True).clamp(min=tiny)
    rows = sizes.sum(1, keepdim=True).clamp(min=tiny)
    return sizes / columns + sizes / rows


def best_order(scores: Scores, pattern: str) -> Int[Tensor, " in"]:
    """Look for the order of columns in which a pattern keeps the largest scores.

    Begins with the better of the columns' own order and the heuristic allocation, then
    exchanges whole places: of every group the column at one place is taken out, and all
    of them are put back where together they add most, which is a linear sum assignment.

    Args:
        scores: Importance of each weight, from zero on.
        pattern: ``N:M``, with M dividing the columns.

    Returns:
        Numbers of columns, M consecutive ones a group; rising within a group, and
        groups by their first column, so that equal groupings give equal orders.
    """
    keep, of = keep_of(pattern)
    own = torch.arange(scores.shape[1])
    orders = own, allocated(scores, of)
    order = max(orders, key=lambda one: _kept(scores[:, one], pattern))
    groups = order.view(-1, of).clone()
    total = _kept(scores[:, order], pattern)
    for _ in range(SWEEPS):
        trial = groups.clone()
        for place in range(of):
            _exchange(scores, trial, place, keep=keep)
        found = _kept(scores[:, trial.flatten()], pattern)
        gain = found - total
        if gain > 0:  # rounding aside, no exchange makes it less
            groups, total = trial, found
        if gain <= LEAST_GAIN * total:
            break
    groups = groups.sort(1).values
    return groups[groups[:, 0].argsort()].flatten()


def allocated(scores: Scores, of: int) -> Int[Tensor, " in"]:
    """Deal the columns out to groups by their sum of scores, to and fro like a snake.

    So every group gets one column of each class of importance, and the first of one
    class meets the last of the next.

    Example:
        >>> allocated(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 2)
        tensor([0, 3, 1, 2])
    """
    ranked = scores.double().sum(0).argsort(descending=True, stable=True).view(of, -1)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.t().flatten()


def _exchange(
    scores: Scores, groups: Int[Tensor, "groups of"], place: int, *, keep: int
) -> None:
    """Put the columns at one place where they add most; ``groups`` is written to.

    With the other columns of a group fixed, a column adds to a row what its score is
    above the least that the group keeps: the ``keep``-th largest of the others. The
    sum over rows of ``max(s - t, 0)`` is ``(|s - t| + s - t) / 2``, of which only the
    L1 distance depends on who goes where.
    """
    others = torch.cat([groups[:, :place], groups[:, place + 1 :]], 1)
    least = scores[:, others].topk(keep, dim=2).values[..., -1]
    taken = groups[:, place].clone()
    gains = torch.cdist(scores[:, taken].t(), least.t(), p=1.0)
    column, group = linear_sum_assignment(gains.numpy(), maximize=True)
    groups[torch.from_numpy(group), place] = taken[torch.from_numpy(column)]


def _kept(scores: Scores, pattern: str) -> float:
    """Add up what a pattern keeps."""
    kept = kept_by_pattern(scores, pattern)
    return float(scores.masked_fill(~kept, 0.0).sum(dtype=torch.float64))


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Ria()]
