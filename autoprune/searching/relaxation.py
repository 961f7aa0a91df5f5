"""What limits are worth: the Lagrangian dual of a choice at every site under limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import linprog

CUTS = 40
"""Cuts of the search for the prices of several limits."""

CLOSE = 1e-5
"""Share of the sum of absolute costs within which the dual's maximum is met."""


@dataclass(frozen=True, eq=False)
class Program:
    """Costs to be made least, and limits on sums.

    Attributes:
        costs: What each choice costs, ``[sites, choices]``; inf where not allowed.
        rows: What each choice adds to each limited sum; 0 where not allowed.
        limits: The largest sums, constants included.
        constants: What no choice changes.
    """

    costs: Float[np.ndarray, "sites choices"]
    rows: Float[np.ndarray, "rows sites choices"]
    limits: Float[np.ndarray, " rows"]
    constants: Float[np.ndarray, " rows"]

    @classmethod
    def of(
        cls,
        costs: NDArray[np.float64],
        rows: Sequence[NDArray[np.float64]],
        limits: Sequence[float],
        constants: Sequence[float],
    ) -> Self:
        """Lay out a program; prices of what is not allowed play no part."""
        table = np.array(rows, dtype=np.float64).reshape(-1, *costs.shape)
        table[:, np.isinf(costs)] = 0.0
        return cls(
            costs.astype(np.float64),
            table,
            np.array(limits, dtype=np.float64),
            np.array(constants, dtype=np.float64),
        )

    def totals(self, indices: Int[np.ndarray, " sites"]) -> NDArray[np.float64]:
        """Sum each row, as the worst order of adding up would have it."""
        own = self.rows[:, np.arange(len(indices)), indices]
        # Pairwise and one by one: neither order may find a budget exceeded.
        total = np.maximum(own.sum(axis=1), own.cumsum(axis=1)[:, -1])
        spent: NDArray[np.float64] = total + self.constants
        return spent

    def keeps(self, indices: Int[np.ndarray, " sites"]) -> bool:
        """Tell whether choices are within every limit."""
        return bool((self.totals(indices) <= self.limits).all())

    def lowest(self) -> NDArray[np.float64]:
        """Give the least sum of each row alone."""
        allowed = np.where(np.isinf(self.costs), np.inf, self.rows)
        least: NDArray[np.float64] = allowed.min(axis=2).sum(axis=1) + self.constants
        return least

    def lowest_near(
        self, now: Int[np.ndarray, " sites"], changes: int
    ) -> NDArray[np.float64]:
        """Give the least sum of each row alone, with so many sites changed."""
        sites = np.arange(len(now))
        cheapest = np.where(np.isinf(self.costs), np.inf, self.rows).min(axis=2)
        here = self.rows[:, sites, now]
        saved = here - cheapest
        # A choice of now that is not allowed has to go first.
        order = np.argsort(
            np.where(np.isinf(self.costs[sites, now]), -np.inf, -saved), axis=1
        )
        least = here.copy()
        moved = order[:, :changes]
        np.put_along_axis(
            least, moved, np.take_along_axis(cheapest, moved, axis=1), axis=1
        )
        total: NDArray[np.float64] = least.sum(axis=1) + self.constants
        return total


@dataclass(frozen=True, eq=False)
class Steps:
    """From the cheapest choices on, moves in the order of what they save for a price.

    Attributes:
        start: The cheapest choice of each site, of those the least costly.
        site: Where each move is made.
        choice: What it takes.
        price: What it adds, more than 0.
        slope: Cost by price, less than 0 and rising.
    """

    start: Int[np.ndarray, " sites"]
    site: Int[np.ndarray, " steps"]
    choice: Int[np.ndarray, " steps"]
    price: Float[np.ndarray, " steps"]
    slope: Float[np.ndarray, " steps"]


def sweep(
    costs: Float[np.ndarray, "sites choices"],
    prices: Float[np.ndarray, "sites choices"],
) -> Steps:
    """Walk the lower convex hull of every site at once, and merge the walks."""
    rows = np.arange(len(costs))
    barred = np.isinf(costs)
    cheapest = np.where(barred, np.inf, prices)
    least = cheapest == cheapest.min(axis=1, keepdims=True)
    start = np.where(least, costs, np.inf).argmin(axis=1)
    current = start.copy()
    last = np.full(len(costs), -np.inf)
    found: list[tuple[NDArray[np.float64], ...]] = []
    for _ in range(costs.shape[1] - 1):
        rise = prices - prices[rows, current][:, None]
        fall = costs - costs[rows, current][:, None]
        better = ~barred & (rise > 0) & (fall < 0)
        slope = np.divide(fall, rise, out=np.zeros_like(fall), where=better)
        pick = slope.argmin(axis=1)
        moved = better[rows, pick]
        if not moved.any():
            break
        # Rounding must not put a later move of a site before an earlier one.
        last = np.maximum(last, slope[rows, pick])
        site = rows[moved]
        found.append((site, pick[moved], rise[site, pick[moved]], last[moved]))
        current = np.where(moved, pick, current)
    if not found:
        none = np.zeros(0)
        return Steps(start, none.astype(np.int64), none.astype(np.int64), none, none)
    site, choice, price, slopes = (
        np.concatenate(part) for part in zip(*found, strict=True)
    )
    order = np.argsort(slopes, kind="stable")
    return Steps(start, site[order], choice[order], price[order], slopes[order])


def shadow_prices(program: Program) -> NDArray[np.float64]:
    """Price the limits: the maximum of the Lagrangian dual, nearly if there are many.

    Any prices give a bound, better ones a smaller core. One limit is priced by the
    sweep, several by Kelley's cutting planes.
    """
    alone = [_weight(program, row) for row in range(len(program.rows))]
    if len(alone) == 1:
        return np.array([alone[0][0]])
    most = 10 * max(steepest for _, steepest in alone)
    sites = np.arange(len(program.costs))
    slopes, heights = [], []

    def cut(weights: NDArray[np.float64]) -> float:
        """Add the plane that touches the dual here, and give its height."""
        priced = program.costs + np.tensordot(weights, program.rows, axes=1)
        best = priced.argmin(axis=1)
        over = program.totals(best) - program.limits
        cost = float(program.costs[sites, best].sum())
        slopes.append(over)
        heights.append(cost)
        return cost + float(over @ weights)

    tried = list(np.diag([weight for weight, _ in alone]))
    values = [cut(weights) for weights in tried]
    enough = CLOSE * (abs(max(values)) or most)
    for _ in range(CUTS):
        planes = np.hstack([-np.array(slopes), np.ones((len(slopes), 1))])
        ranges = [(0, most)] * len(alone) + [(None, None)]
        goal = np.append(np.zeros(len(alone)), -1.0)
        top = linprog(goal, A_ub=planes, b_ub=heights, bounds=ranges, method="highs")
        if top.x is None or -top.fun - max(values) <= enough:
            break
        tried.append(np.maximum(top.x[:-1], 0))
        values.append(cut(tried[-1]))
    return tried[int(np.argmax(values))]


def _weight(program: Program, row: int) -> tuple[float, float]:
    """Give the slope where the sweep meets a limit, and the steepest of all."""
    steps = sweep(program.costs, program.rows[row])
    if not len(steps.slope):
        return 0.0, 0.0
    begin = program.rows[row, np.arange(len(steps.start)), steps.start].sum()
    spent = begin + np.cumsum(steps.price)
    over = np.flatnonzero(spent > program.limits[row])
    met = -float(steps.slope[over[0]]) if len(over) else 0.0
    return met, -float(steps.slope[0])
