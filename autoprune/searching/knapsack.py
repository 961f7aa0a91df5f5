"""The least sum of costs, one choice a site, within several limits: a knapsack.

The prices of the limits by Lagrange tell what each choice loses against its site's best
at these prices; the losses of an optimum, and what it leaves unused, add up to what it
is above the bound. Both are small, so all solutions up to a small sum are listed, and
the sum is doubled until there is one: the optimum of 210 sites of 16 choices within one
limit in 3 ms, where HiGHS takes 50 to 250. The idea is Pisinger's core ("A minimal
algorithm for the multiple-choice knapsack problem", 1995); we list by loss, and for
several limits. Where the list grows too long, HiGHS solves what it leaves open.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from autoprune.searching.relaxation import Program, shadow_prices

GAP = 1e-4
"""Share of the sum of absolute costs that a solution may be above the least, where not
all partial solutions could be kept."""

CORE = 24
"""Choices of the first list, beside the best of each site."""

STATES = 2048
"""Partial solutions at once; beyond, the most promising are kept."""

WIDER = 4.0
"""Times the width of a list cut short, in which HiGHS looks first."""

FEW = 256
"""Partial solutions among which those undercut by others are not looked for."""

NODES = 2000
"""Nodes of branch and bound. There is no limit of time: the machine's load must not
decide what a resumed run proposes."""

TRIES = 8
"""Times that limits are tightened against the tolerance of HiGHS."""

ROUNDING = 1e-9
"""Share of a limit that sums are rounded by; exact sums are checked at the end."""


def minimise(program: Program) -> Int[np.ndarray, " sites"] | None:
    """Find the choices of least cost within the limits; None if there are none.

    Every limit must be within reach by itself.
    """
    free: NDArray[np.int64] = program.costs.argmin(axis=1)
    if program.keeps(free):
        return free
    tight = program
    for attempt in range(TRIES):
        found = _solve(_scaled(tight))
        if found is None or program.keeps(found):
            return found
        # HiGHS keeps a limit to a millionth only.
        over = np.maximum(program.totals(found) - program.limits, 0)
        limits = tight.limits - 2.0**attempt * (over + np.spacing(tight.limits))
        tight = replace(tight, limits=np.where(over > 0, limits, tight.limits))
    return None


def _scaled(program: Program) -> Program:
    """Count each row from its least sum, in units of what is left above that."""
    allowed = np.where(np.isinf(program.costs), np.inf, program.rows)
    floor = allowed.min(axis=2)
    left = np.maximum(program.limits - program.constants - floor.sum(axis=1), 0)
    rise = np.where(np.isinf(program.costs), 0, program.rows - floor[:, :, None])
    unit = np.where(left > 0, left, rise.max(axis=(1, 2), initial=0))
    unit = np.where(unit > 0, unit, 1.0)
    return Program(
        program.costs, rise / unit[:, None, None], left / unit, np.zeros(len(unit))
    )


def _solve(program: Program) -> NDArray[np.int64] | None:
    """Look ever further from the best choices at the limits' prices for a solution."""
    weights = shadow_prices(program)
    priced = program.costs + np.tensordot(weights, program.rows, axes=1)
    base = priced.min(axis=1, keepdims=True)
    bound = float(base.sum() - weights @ program.limits)
    loss = priced - base
    steps = np.sort(loss[np.isfinite(loss) & (loss > 0)])
    width = float(steps[min(CORE, len(steps) - 1)]) if len(steps) else 0.0
    while True:
        listing = _Listing(program, weights, loss, width=width)
        found = listing.best()
        if found is not None and listing.complete:
            return found
        if not listing.complete:
            return _finish(program, loss, bound, width=WIDER * width, found=found)
        # No solution loses more than all sites at their worst and all limits unused.
        if width > loss[np.isfinite(loss)].sum() + weights @ program.limits:
            return None
        width *= 2


def _finish(
    program: Program,
    loss: NDArray[np.float64],
    bound: float,
    *,
    width: float,
    found: NDArray[np.int64] | None,
) -> NDArray[np.int64] | None:
    """Take what a cut list gave if it is close to the bound, or ask HiGHS."""
    near = program.costs[np.arange(len(loss)), loss.argmin(axis=1)]
    enough = GAP * float(np.abs(near).sum())
    if found is None:
        found = _branch(program, loss <= width, near)
        enough = max(enough, width)
    if found is None:
        return _branch(program, np.isfinite(loss), near)
    excess = float(program.costs[np.arange(len(found)), found].sum()) - bound
    if excess <= enough:
        return found
    # What loses more than a known solution is above the bound is in no better one.
    better = _branch(program, loss <= excess, near)
    if better is None:
        return found
    # At its limit of nodes HiGHS may stop at something worse.
    sites = np.arange(len(found))
    both = [program.costs[sites, one].sum() for one in (found, better)]
    return found if both[0] <= both[1] else better


class _Listing:
    """All solutions that cost at most ``width`` over the bound, site by site.

    Attributes:
        complete: False if partial solutions were dropped that could have been better.
    """

    def __init__(
        self,
        program: Program,
        weights: NDArray[np.float64],
        loss: NDArray[np.float64],
        *,
        width: float,
    ) -> None:
        sites = np.arange(len(loss))
        self.complete = True
        self._weights, self._loss = weights, loss
        self._width = width * (1 + ROUNDING)
        self._indices = loss.argmin(axis=1)
        here = program.rows[:, sites, self._indices]
        self._over = here.sum(axis=1) - program.limits
        self._change = program.rows - here[:, :, None]
        self._core = loss <= width
        least = np.where(self._core, self._change, np.inf).min(axis=2)
        most = np.where(self._core, self._change, -np.inf).max(axis=2)
        # Small changes come last, when little is left to fill.
        free = np.flatnonzero(self._core.sum(axis=1) > 1)
        span = (most - least)[:, free].max(axis=0, initial=0.0)
        self._sites = free[np.argsort(-span, kind="stable")]
        self._down = _still_to_come(least[:, self._sites])
        self._up = _still_to_come(most[:, self._sites])
        self._binding = np.flatnonzero(self._over + self._up[:, 0] > 0)

    def best(self) -> NDArray[np.int64] | None:
        """Give the solution of least cost; None if there is none."""
        sums, lost = self._over[:, None], np.zeros(1)
        trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for turn, site in enumerate(self._sites):
            options = np.flatnonzero(self._core[site])
            lost = np.add.outer(lost, self._loss[site, options]).ravel()
            change = self._change[:, site, options]
            sums = (sums[:, :, None] + change[:, None, :]).reshape(len(sums), -1)
            kept = self._alive(lost, sums, turn + 1)
            lost, sums = lost[kept], sums[:, kept]
            trail.append((kept // len(options), options[kept % len(options)]))
        total = lost - self._weights @ sums
        within = (sums <= ROUNDING).all(axis=0) & (total <= self._width)
        if not within.any():
            return None
        state = int(np.where(within, total, np.inf).argmin())
        found: NDArray[np.int64] = self._indices.copy()
        for site, (parents, choices) in zip(
            self._sites[::-1], trail[::-1], strict=True
        ):
            found[site] = choices[state]
            state = int(parents[state])
        return found

    def _alive(
        self, lost: NDArray[np.float64], sums: NDArray[np.float64], turn: int
    ) -> NDArray[np.int64]:
        """Pick the partial solutions that can still end within limits and width."""
        # What has to stay unused of a limit is lost as well, at the limit's price.
        unused = np.maximum(-(sums + self._up[:, turn, None]), 0)
        lost_at_least = lost + self._weights @ unused
        alive = lost_at_least <= self._width
        alive &= (sums + self._down[:, turn, None] <= ROUNDING).all(axis=0)
        kept = np.flatnonzero(alive)
        if len(kept) > FEW:
            cost = lost[kept] - self._weights @ sums[:, kept]
            kept = kept[_undominated(cost, sums[self._binding][:, kept])]
        if len(kept) > STATES:
            self.complete = False
            first = np.argsort(lost_at_least[kept], kind="stable")[:STATES]
            kept = np.sort(kept[first])
        return kept


def _still_to_come(changes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum, for each turn, the changes of this and later turns."""
    rest = np.zeros((len(changes), changes.shape[1] + 1))
    rest[:, :-1] = changes[:, ::-1].cumsum(axis=1)[:, ::-1]
    return rest


def _undominated(
    cost: NDArray[np.float64], sums: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Keep what nothing undercuts in cost and one sum, the other sums being equal."""
    if not len(sums):
        return np.array([cost.argmin()])
    # The sum of most values is compared, the others are grouped.
    levels = [np.unique(np.round(row, 9), return_inverse=True)[1] for row in sums]
    order = sorted(range(len(sums)), key=lambda row: int(levels[row].max()))
    group = np.zeros(len(cost), dtype=np.int64)
    for row in order[:-1]:
        group = group * (int(levels[row].max()) + 1) + levels[row]
    ranks = np.argsort(np.argsort(cost, kind="stable"), kind="stable")
    by = np.lexsort((ranks, levels[order[-1]], group))
    group = np.unique(group[by], return_inverse=True)[1]
    # A later group's ranks lie below an earlier one's: it is not undercut by that.
    rank = ranks[by] - group * len(cost)
    before = np.minimum.accumulate(np.append(len(cost), rank[:-1]))
    kept: NDArray[np.int64] = np.sort(by[rank < before])
    return kept


def _branch(
    program: Program, core: NDArray[np.bool_], reference: NDArray[np.float64]
) -> NDArray[np.int64] | None:
    """Solve with HiGHS what has too many partial solutions; None if there is none."""
    site, choice = np.nonzero(core)
    columns = len(site)
    # A last, constant column lifts the goal to the sum that the gap is a share of.
    scale = float(np.abs(reference).sum()) or 1.0
    goal = (program.costs[site, choice] - reference[site]) / scale
    one_each = sparse.csr_array(
        (np.ones(columns), (site, np.arange(columns))), shape=(len(core), columns + 1)
    )
    prices = np.hstack(
        [program.rows[:, site, choice], np.zeros((len(program.limits), 1))]
    )
    lower = np.append(np.zeros(columns), 1)
    result = milp(
        np.append(goal, 1.0),
        integrality=np.append(np.ones(columns), 0),
        bounds=Bounds(lower, np.ones(columns + 1)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(prices, -np.inf, program.limits),
        ],
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    if result.x is None:
        return None
    indices = np.zeros(len(core), dtype=np.int64)
    taken = result.x[:-1] > 0.5
    indices[site[taken]] = choice[taken]
    return indices
