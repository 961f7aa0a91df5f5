"""Exact steps of the Optimal Brain Surgeon, for many rows at once.

Settling a weight ``p`` of a row at another value costs ``error² / C_pp``, and the
weights that are still free make good what they can by ``-error / C_pp * C[:, p]``,
where ``C`` is the inverse of the row's Hessian over its free weights (Hassibi and
Stork 1993, Eq. 5; Frantar and Alistarh 2022, arXiv:2208.11580, Sec. 4). Then
``p`` is eliminated from ``C``.

Half of the squared output error would be the loss of the papers; here all of it counts,
so that losses add up to ``output_error``.
"""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from autoprune.compression.factor import Factor
from autoprune.compression.method import keep_of

PANEL = 32
"""Weights of a row that are settled before ``C`` itself is brought up to date."""

BATCH_BYTES = 64 * 2**20
"""Most memory for the inverse Hessians of rows that are treated together."""


OUTLIER = 0.5 + 1e-9
"""Steps off the grid from which a weight is rounded at once; the rest is rounding."""


def inverse_and_hessian(
    factor: Factor,
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "in in"]]:
    """Give the inverse of the damped Hessian and the Hessian itself, in float64.

    Products of a triangle with itself, so both are positive definite by construction.
    """
    lower, cost = -factor.feedback.double(), factor.cost.double()
    identity = torch.eye(len(lower), dtype=torch.double)
    other = torch.linalg.solve_triangular(lower, identity, upper=False)
    return (lower / cost) @ lower.T, other.T @ (cost[:, None] * other)


class Rows:
    """Rows whose weights are settled one at a time, each in an order of its own.

    How we differ: the papers subtract an outer product from every row's ``C`` at each
    step. Here the columns of a panel are kept apart and subtracted together, as a
    matrix product: the same numbers, several times faster. A column that is needed
    before is brought up to date alone.

    Args:
        weights: Rows; never written to.
        inverse: ``C`` with every weight free, of all rows or of each.

    Attributes:
        weights: Settled values, and free weights as compensated so far.
        diagonal: ``C_pp`` of every free weight.
        free: True for a weight that is not settled yet.
    """

    def __init__(
        self, weights: Float[Tensor, "rows in"], inverse: Float[Tensor, "*rows in in"]
    ) -> None:
        self.weights = weights.double().clone()
        self.free = torch.ones(weights.shape, dtype=torch.bool)
        self._inverse = inverse.double().expand(len(weights), -1, -1).clone()
        self.diagonal = self._inverse.diagonal(dim1=1, dim2=2).clone()
        self._floor = self.diagonal * torch.finfo(torch.double).eps
        self._panel = self.weights.new_empty(len(weights), PANEL, weights.shape[1])
        self._each = torch.arange(len(weights))
        self._used = 0

    def settle(
        self, at: Int[Tensor, " rows"], target: Float[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Settle one weight of each row at a value; tell what it costs."""
        each, used = self._each, self._used
        column = self._inverse[each, at]
        if used:
            panel = self._panel[:, :used]
            shares = panel[each, :, at]
            column -= torch.bmm(shares[:, None], panel)[:, 0]
        root = self.diagonal[each, at].sqrt()
        # Settled weights take no further part; rounding must not move them.
        column = column * self.free / root[:, None]
        error = (self.weights[each, at] - target) / root
        self.weights.addcmul_(error[:, None], column, value=-1)
        self.weights[each, at] = target
        self.diagonal.addcmul_(column, column, value=-1)
        torch.maximum(self.diagonal, self._floor, out=self.diagonal)
        self.free[each, at] = False
        self._panel[:, used] = column
        self._used += 1
        if self._used == PANEL:
            self._inverse.baddbmm_(self._panel.transpose(1, 2), self._panel, alpha=-1)
            self._used = 0
        return error.square()


@dataclass(frozen=True, eq=False)
class Trace:
    """In which order rows lose their weights, and what each removal costs.

    Attributes:
        order: The column that goes at each step.
        losses: What its removal adds to the squared error of the row's output, with
            the best weights before and after.
    """

    order: Int[Tensor, "rows steps"]
    losses: Float[Tensor, "rows steps"]

    def kept(self, counts: Int[Tensor, " rows"], columns: int) -> Bool[Tensor, "_ in"]:
        """Mark what is left of each row after its first ``counts`` removals."""
        kept = torch.ones(len(counts), columns, dtype=torch.bool)
        stays = torch.arange(self.order.shape[1]) >= counts[:, None]
        return kept.scatter_(1, self.order, stays)


def remove_greedily(
    weights: Float[Tensor, "rows in"],
    inverse: Float[Tensor, "in in"],
    steps: int,
    *,
    pattern: str | None = None,
) -> Trace:
    """Remove, step by step, the weight of each row that costs least.

    Args:
        weights: Rows that share a Hessian; never written to.
        inverse: Inverse of their Hessian.
        steps: Weights to remove of every row.
        pattern: ``N:M``: no more than M - N are removed of M consecutive ones.
    """
    count, columns = weights.shape
    keep, of = keep_of(pattern) if pattern else (0, columns)
    order = torch.empty(count, steps, dtype=torch.long)
    losses = torch.empty(count, steps, dtype=torch.double)
    for at in _batches(count, columns):
        rows = Rows(weights[at], inverse)
        zero = torch.zeros(len(rows.weights), dtype=torch.double)
        for step in range(steps):
            open_ = rows.free.view(-1, columns // of, of)
            if pattern:
                open_ = open_ & (open_.sum(2, keepdim=True) > keep)
            costs = rows.weights.square() / rows.diagonal
            costs.masked_fill_(~open_.reshape(rows.free.shape), torch.inf)
            order[at, step] = least = costs.argmin(1)
            losses[at, step] = rows.settle(least, zero)
    return Trace(order, losses)


def counts_of_layer(
    losses: Float[Tensor, "rows steps"], removed: int
) -> Int[Tensor, " rows"]:
    """Tell how many weights each row loses if the layer loses ``removed``.

    A row gives up its weights in the order of its trace. So a removal counts as the
    costliest of its row until then: it cannot be had without those before it.
    """
    costs = losses.cummax(1).values.flatten()
    chosen = costs.argsort(stable=True)[:removed]
    return torch.bincount(chosen // losses.shape[1], minlength=len(losses))


def best_on_support(
    weights: Float[Tensor, "rows in"],
    kept: Bool[Tensor, "rows in"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, "rows in"]:
    """Give the weights with the least output error among those with a row's support.

    They solve ``H_SS x = (H w)_S``: where the surgeon's updates lead, in one step.
    """
    best = torch.zeros(weights.shape, dtype=torch.double)
    for at in _batches(*weights.shape):
        part = _Survivors.of(kept[at], hessian)
        right = part.gather(weights[at].double() @ hessian)
        lower = torch.linalg.cholesky(part.hessian)
        best[at] = part.spread(torch.cholesky_solve(right[..., None], lower)[..., 0])
    return best


@dataclass(frozen=True, eq=False)
class Grid:
    """Where every weight may be rounded to: whole multiples of its step.

    Attributes:
        step: Distance of neighbours.
        low: Smallest multiple.
        high: Largest multiple.
    """

    step: Float[Tensor, "rows in"]
    low: Float[Tensor, "rows in"]
    high: Float[Tensor, "rows in"]

    def nearest(self, weights: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
        """Give the multiple of the step that is nearest to each weight."""
        return (weights / self.step).round_().clamp_(self.low, self.high)


def round_greedily(
    weights: Float[Tensor, "rows in"],
    kept: Bool[Tensor, "rows in"],
    hessian: Float[Tensor, "in in"],
    grid: Grid,
) -> Float[Tensor, "rows in"]:
    """Round, step by step, the weight of each row that costs least (OBQ).

    A weight that compensation has pushed over half a step off its grid is rounded at
    once, the farthest first, before it drifts on (arXiv:2208.11580, Sec. 5).

    Args:
        weights: Rows, best on their support; never written to.
        kept: True where a weight may differ from zero; the others stay zeros.
        hessian: Damped Hessian of the inputs.
        grid: Of every weight.

    Returns:
        Multiples of the steps; 0 where not kept.
    """
    rounded = torch.zeros(weights.shape, dtype=torch.double)
    for at in _batches(*weights.shape):
        part = _Survivors.of(kept[at], hessian)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(part.hessian))
        rows = Rows(part.gather(weights[at].double()), inverse)
        ends = (part.gather(end[at].double()) for end in (grid.low, grid.high))
        own = Grid(part.gather(grid.step[at].double(), 1.0), *ends)
        for _ in range(rows.free.shape[1]):
            multiples = own.nearest(rows.weights)
            target = multiples * own.step
            errors = (rows.weights - target).abs()
            drift = errors / own.step
            costs = errors.square() / rows.diagonal
            costs = torch.where(drift > OUTLIER, -drift, costs)
            least = costs.masked_fill_(~rows.free, torch.inf).argmin(1)
            rows.settle(least, target.gather(1, least[:, None])[:, 0])
        rounded[at] = part.spread((rows.weights / own.step).round_())
    return rounded


@dataclass(frozen=True, eq=False)
class _Survivors:
    """The kept weights of some rows, side by side, each row with its own Hessian.

    Rows with fewer than others are filled up with weights that touch no other.
    """

    index: Int[Tensor, "rows most"]
    real: Bool[Tensor, "rows most"]
    hessian: Float[Tensor, "rows most most"]
    columns: int

    @classmethod
    def of(cls, kept: Bool[Tensor, "rows in"], hessian: Float[Tensor, "in in"]) -> Self:
        counts = kept.sum(1)
        index = kept.byte().argsort(dim=1, descending=True, stable=True)
        index = index[:, : int(counts.max())]
        real = torch.arange(index.shape[1]) < counts[:, None]
        own = hessian[index[:, :, None], index[:, None, :]]
        own *= real[:, :, None] & real[:, None, :]
        own.diagonal(dim1=1, dim2=2).add_(~real)
        return cls(index, real, own, kept.shape[1])

    def gather(self, full: Float[Tensor, "rows in"], filler: float = 0.0) -> Tensor:
        return full.gather(1, self.index).masked_fill_(~self.real, filler)

    def spread(self, values: Float[Tensor, "rows most"]) -> Float[Tensor, "rows in"]:
        full = values.new_zeros(len(values), self.columns)
        return full.scatter_(1, self.index, values * self.real)


def _batches(rows: int, columns: int) -> list[slice]:
    size = max(1, BATCH_BYTES // (columns * columns * 8))
    return [slice(at, at + size) for at in range(0, rows, size)]
