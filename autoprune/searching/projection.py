"""Budgets met exactly: any choice of actions, moved on to them in few steps.

A proposal over a budget need not be punished: sites drawn at random go down one level
of price at a time until it fits, others up until at most ``SLACK`` is left.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.random import Generator
from numpy.typing import NDArray

from autoprune.errors import BudgetError
from autoprune.searching.budget import Budget, Prices, prices_of
from autoprune.searching.space import SearchSpace

SLACK = 0.002
"""Share of the first budget that may stay unused where the options allow less."""

ROUNDS = 24
"""Raises and exchanges in turn before a remaining gap is taken as it is."""

PATHS = 16
"""Random paths, ever further from the proposal, before the smallest gap is taken."""

DRAWS = 64
"""Random pairs looked at in one exchange."""

SETTLE = 200
"""Steps of the search for one policy within several budgets."""


class Projection:
    """Moves choices on to budgets.

    Args:
        space: The space.
        prices: Prices of at least the budgets' metrics.
        budgets: At least one; the first is filled up, the others only kept.
        among: Rows of choices ``[rows, sites]`` to which every site is restricted.

    Attributes:
        cheapest: A choice within all budgets; with one budget the cheapest of all.

    Raises:
        ConfigError: If a budget's metric has no price.
        BudgetError: If no choice is within the budgets.
    """

    def __init__(
        self,
        space: SearchSpace,
        prices: Sequence[Prices],
        budgets: Sequence[Budget],
        *,
        among: Int[np.ndarray, "rows sites"] | None = None,
    ) -> None:
        named = [prices_of(budget.metric, prices) for budget in budgets]
        self._budgets = tuple(budgets)
        self._limits = np.array([budget.limit for budget in budgets])
        self._constants = np.array([entry.constant for entry in named])
        self._costs = np.stack([entry.padded(space) for entry in named])
        self._rows = np.arange(len(space.sites))
        if among is not None:
            barred = np.ones(self._costs.shape[1:], dtype=bool)
            barred[self._rows, among] = False
            self._costs[:, barred] = np.inf
        dearest = np.where(np.isfinite(self._costs[0]), self._costs[0], -np.inf)
        highest = float(dearest.max(axis=1).sum() + self._constants[0])
        # A budget that nothing exceeds bounds nothing: filled up, it would turn all
        # choices into the one that costs most.
        binding = highest > budgets[0].limit
        self._slack = SLACK * budgets[0].limit if binding else math.inf
        self.cheapest = self._settle()

    def totals(
        self, indices: Int[np.ndarray, " sites"]
    ) -> Float[np.ndarray, " budgets"]:
        """Sum what choices cost, one number a budget."""
        totals: NDArray[np.float64] = self._costs[:, self._rows, indices].sum(axis=1)
        totals += self._constants
        return totals

    def fit(
        self, indices: Int[np.ndarray, " sites"], rng: Generator
    ) -> Int[np.ndarray, " sites"]:
        """Move choices on to the budgets, by few and small moves at random sites.

        Args:
            indices: Any choices; left untouched.
            rng: The only source of chance: equal state, equal result.

        Returns:
            Choices within every budget, and at most ``SLACK`` under the first where
            a few random paths of moves and pairs of moves reach it. Choices within
            a first budget that no policy exceeds stay as they are.
        """
        start = np.array(indices, dtype=np.int64)
        barred = np.isinf(self._costs[0, self._rows, start])
        start[barred] = self.cheapest[barred]
        best = self._walk(start, rng)
        for path in range(1, PATHS):
            if self._short(best) <= self._slack:
                break
            shaken = rng.random(len(start)) < path / PATHS
            anything = _draw(np.isfinite(self._costs[0]), rng)
            other = np.where(shaken, anything, start)
            self._leap(other, best, rng)
            best = min(best, self._walk(other, rng), key=self._short)
        return best

    def fill(
        self,
        indices: Int[np.ndarray, " sites"],
        costs: Float[np.ndarray, "sites choices"],
        rng: Generator,
    ) -> Int[np.ndarray, " sites"]:
        """Use up what a choice leaves of the first budget, at the least cost.

        Args:
            indices: Choices within the budgets; left untouched.
            costs: What each choice adds to a score; inf where it is not to be taken.
            rng: For the exchanges of two sites that follow where nothing fits alone.

        Returns:
            Choices within the budgets, raised one by one where that costs least for its
            price, until at most ``SLACK`` is left or nothing fits.
        """
        current = np.array(indices, dtype=np.int64)
        for _ in range(len(current) * self._costs.shape[2]):
            if self._short(current) <= self._slack:
                break
            rise = self._costs - self._costs[:, self._rows, current][:, :, None]
            gap = self._gap(current)[:, None, None]
            able = (rise <= gap).all(axis=0) & (rise[0] > 0) & np.isfinite(costs)
            if not able.any():
                return min(self._walk(current, rng), current, key=self._short)
            more = costs - costs[self._rows, current][:, None]
            rate = np.where(able, more, np.inf) / np.where(able, rise[0], 1.0)
            site, choice = np.unravel_index(int(rate.argmin()), rate.shape)
            current[site] = choice
        return current

    def _walk(self, start: NDArray[np.int64], rng: Generator) -> NDArray[np.int64]:
        """Go one random path from any choices to choices on the budgets."""
        current = start.copy()
        self._lower(current, rng)
        for _ in range(ROUNDS):
            self._raise(current, rng)
            if self._short(current) <= self._slack or not self._exchange(current, rng):
                break
        return current

    def _leap(
        self, start: NDArray[np.int64], best: NDArray[np.int64], rng: Generator
    ) -> None:
        """Make one site dear, likelier one with far to go: others have to make room.

        A site that is large beside the rest, as an embedding is, would stay as cheap as
        it is where no small move leads over the gap.
        """
        costs = np.where(np.isfinite(self._costs[0]), self._costs[0], -np.inf)
        rise = costs.max(axis=1) - costs[self._rows, best]
        if rise.sum() > 0:
            site = rng.choice(len(rise), p=rise / rise.sum())
            start[site] = costs[site].argmax()

    def _short(self, current: NDArray[np.int64]) -> float:
        """Tell how far the first metric is under its budget."""
        return float(self._limits[0] - self.totals(current)[0])

    def _gap(self, current: NDArray[np.int64]) -> NDArray[np.float64]:
        gap: NDArray[np.float64] = self._limits - self.totals(current)
        return gap

    def _lower(self, current: NDArray[np.int64], rng: Generator) -> None:
        """Bring what is over a budget down, one level of price at a time."""
        for _ in range(2 * self._costs.shape[2]):
            over = -self._gap(current)
            worst = int(np.argmax(over / self._limits))
            if over[worst] <= 0:
                return
            costs = self._costs[worst]
            here = costs[self._rows, current][:, None]
            level = np.where(costs < here, costs, -np.inf).max(axis=1)
            chosen = _draw(costs == level[:, None], rng)
            order = rng.permutation(np.flatnonzero(level > -np.inf))
            saved = np.cumsum((here[:, 0] - level)[order])
            order = order[: int(np.searchsorted(saved, over[worst])) + 1]
            current[order] = chosen[order]
        self._retreat(current, rng)

    def _retreat(self, current: NDArray[np.int64], rng: Generator) -> None:
        """Take choices known to fit, site by site, where budgets pull apart."""
        order = rng.permutation(self._rows)
        costs = self._costs[:, order]
        places = np.arange(len(order))
        after = costs[:, places, self.cheapest[order]]
        change = after - costs[:, places, current[order]]
        fits = np.cumsum(change, axis=1) <= self._gap(current)[:, None]
        # The last always fits, but rounding of the running sum may hide it.
        enough = np.flatnonzero(fits.all(axis=0))
        count = int(enough[0]) + 1 if len(enough) else len(order)
        current[order[:count]] = self.cheapest[order[:count]]

    def _raise(self, current: NDArray[np.int64], rng: Generator) -> None:
        """Move sites up one level of price while that fits and too much is left."""
        while (short := self._short(current)) > self._slack:
            gap = self._gap(current)
            costs = self._costs[0]
            here = costs[self._rows, current][:, None]
            level = np.where(costs > here, costs, np.inf).min(axis=1)
            rises = level < np.inf
            chosen = np.where(rises, _draw(costs == level[:, None], rng), current)
            change = self._change(current, chosen)
            fits = rises & (change <= gap[:, None]).all(axis=0)
            order = rng.permutation(np.flatnonzero(fits))
            if not len(order):
                return
            spent = np.cumsum(change[:, order], axis=1)
            keeps = np.logical_and.accumulate((spent <= gap[:, None]).all(axis=0))
            enough = np.searchsorted(spent[0], short - self._slack) + 1
            # A first move that fits alone always stays, whatever rounding says.
            order = order[: max(1, min(int(keeps.sum()), int(enough)))]
            current[order] = chosen[order]

    def _change(
        self, current: NDArray[np.int64], chosen: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        before = self._costs[:, self._rows, current]
        after = self._costs[:, self._rows, chosen]
        return after - before

    def _exchange(self, current: NDArray[np.int64], rng: Generator) -> bool:
        """Fill the gap by two moves at two sites; False if no pair gains anything."""
        gap = self._gap(current)
        sites, choices = np.nonzero(np.isfinite(self._costs[0]))
        moved = choices != current[sites]
        sites, choices = sites[moved], choices[moved]
        change = self._costs[:, sites, choices] - self._costs[:, sites, current[sites]]
        order = np.argsort(change[0], kind="stable")
        sites, choices, change = sites[order], choices[order], change[:, order]
        lack = self._short(current) - self._slack
        first = np.searchsorted(change[0], lack - change[0])
        end = np.searchsorted(change[0], gap[0] - change[0], side="right")
        some = np.flatnonzero(end > first)
        if len(some):
            one = rng.choice(some, DRAWS)
            two = rng.integers(first[one], end[one])
        else:
            one = np.flatnonzero(end > 0)
            two = end[one] - 1
        gain = change[:, one] + change[:, two]
        good = (sites[one] != sites[two]) & (gain <= gap[:, None]).all(axis=0)
        good &= gain[0] > 0
        if not good.any():
            return False
        best = int(np.argmax(good if len(some) else np.where(good, gain[0], -np.inf)))
        for pick in (one[best], two[best]):
            current[sites[pick]] = choices[pick]
        return True

    def _settle(self) -> NDArray[np.int64]:
        """Find a choice within all budgets, weighing up those it breaks."""
        lowest = self._costs.min(axis=2).sum(axis=1) + self._constants
        for budget, reach in zip(self._budgets, lowest, strict=True):
            if reach > budget.limit:
                raise BudgetError(
                    f"no policy of the space has {budget.metric} <= "
                    f"{_number(budget.limit)}; the cheapest has {_number(reach)}. "
                    "Raise the budget or allow actions that cost less."
                )
        shares = self._costs / self._limits[:, None, None]
        weights = np.ones(len(self._limits))
        for _ in range(SETTLE if len(weights) > 1 else 1):
            weighted = np.tensordot(weights / weights.sum(), shares, axes=1)
            choice: NDArray[np.int64] = np.argmin(weighted, axis=1)
            over = self.totals(choice) / self._limits - 1
            if (over <= 0).all():
                return choice
            weights = weights * np.exp(np.clip(4 * over, -1, 1))
        named = " and ".join(f"{b.metric} <= {_number(b.limit)}" for b in self._budgets)
        raise BudgetError(
            f"no policy of the space was found with {named} at once; each alone can be "
            f"met, from {', '.join(_number(reach) for reach in lowest)}. Raise one."
        )


def _draw(options: NDArray[np.bool_], rng: Generator) -> NDArray[np.int64]:
    """Pick one option of each row at random."""
    draws = np.where(options, rng.random(options.shape), -1.0)
    drawn: NDArray[np.int64] = np.argmax(draws, axis=1)
    return drawn


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.6g}"
