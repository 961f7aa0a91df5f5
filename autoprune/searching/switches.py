"""Level switches: moves of few sites by one level, which leave the budgets met."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy.random import Generator
from numpy.typing import NDArray

from autoprune.policy import Action
from autoprune.searching.budget import prices_of
from autoprune.searching.problem import Problem
from autoprune.searching.projection import SLACK
from autoprune.searching.rows import Trial
from autoprune.searching.space import SearchSpace

Positions = NDArray[np.int64]


Mask = NDArray[np.bool_]


SWITCHES = 3
"""Most switches of one offspring; EvoPress's ablation has 3 before 1 and before 15."""


PARTNERS = 10
"""Most sites that make room for one raise; beyond, the projection does the rest."""


TRIES = 4
"""Sets of switches drawn until one meets the budgets by itself."""


class LevelSwitches:
    """Moves of few sites by one level, which leave the first budget met.

    A level is a step of price, in the first budget's metric, within a family: the
    actions of the same methods, with dense as everybody's dearest. A move to another
    family goes to its choice next in price. So pruning is exchanged for quantization at
    the bytes, or the microseconds, that each is worth.

    Args:
        problem: What may be chosen. Where no budget binds, a switch moves one site,
            up or down.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        space, prices, budgets = problem.space, problem.prices, problem.budgets
        self._rows = np.arange(len(space.sites))
        self._members = _families(space)
        self._constant = self._limit = 0.0
        if budgets:
            named = prices_of(budgets[0].metric, prices)
            self._constant, self._limit = named.constant, budgets[0].limit
            self._price = named.padded(space)
        elif prices:
            self._price = prices[0].padded(space)
        else:
            order = np.arange(self._members.shape[2], dtype=np.float64)
            self._price = np.where(self._members.any(axis=0), order, np.inf)
        dearest = np.where(np.isfinite(self._price), self._price, -np.inf).max(axis=1)
        self._binds = bool(budgets) and self._constant + dearest.sum() > self._limit

    def mutate(
        self, parent: Int[np.ndarray, " sites"], rng: Generator, *, switches: int = 0
    ) -> Int[np.ndarray, " sites"]:
        """Change a few sites by a level.

        Args:
            parent: Position of each site's choice, within the budgets; left untouched.
            rng: The only source of chance.
            switches: How many; 0 draws the smaller of two numbers from 1 to 3.

        Returns:
            Choices within the budgets.
        """
        count = switches or int(rng.integers(1, SWITCHES, 2, endpoint=True).min())
        for _ in range(TRIES):
            child = np.array(parent, dtype=np.int64)
            touched = np.zeros(len(child), dtype=bool)
            for _ in range(count):
                (self._switch if self._binds else self._step)(child, touched, rng)
            if self.as_full(child, parent):
                return child
        # Last, because it moves sites at random that no switch has asked for.
        projection = self._problem.projection
        return child if projection is None else projection.fit(child, rng)

    def as_full(
        self, child: Int[np.ndarray, " sites"], parent: Int[np.ndarray, " sites"]
    ) -> bool:
        """Tell whether a child keeps the budgets, and fills the first as its parent.

        Or to within ``SLACK``. Where levels are coarse no policy may be as full.
        """
        projection = self._problem.projection
        if projection is None:
            return True
        limits = np.array([budget.limit for budget in self._problem.budgets])
        gaps, old = (limits - projection.totals(one) for one in (child, parent))
        full = not self._binds or gaps[0] <= max(SLACK * limits[0], old[0])
        return bool(full and (gaps >= 0).all())

    def _step(self, child: Positions, touched: Mask, rng: Generator) -> None:
        """Move one site up or down, or the other way where none can."""
        for direction in rng.permutation((-1, 1)):
            choice, change = self._neighbours(child, int(direction), rng)
            able = np.isfinite(change) & ~touched
            if able.any():
                self._take(child, touched, choice, able, rng)
                return

    def _switch(self, child: Positions, touched: Mask, rng: Generator) -> None:
        """Raise one site, then lower others until it fits, and fill what is left."""
        choice, change = self._neighbours(child, 1, rng)
        able = np.isfinite(change) & ~touched
        if not able.any():
            return
        self._take(child, touched, choice, able, rng)
        slack = SLACK * self._limit
        for partner in range(PARTNERS):
            spent = self._constant + self._price[self._rows, child].sum()
            gap = self._limit - spent
            if 0 <= gap <= slack:
                return
            choice, change = self._neighbours(child, 1 if gap > 0 else -1, rng)
            able = np.isfinite(change) & (change != 0) & ~touched
            able &= (gap < 0) | (change <= gap)
            fills = able & (change <= gap) & (gap - change <= slack)
            # A partner of just the right price is usually a site of the same size; the
            # first is half of the time any, or sizes would never trade.
            if fills.any() and (partner or rng.random() < 0.5):
                able = fills
            if not able.any():
                return
            self._take(child, touched, choice, able, rng)

    def _take(
        self,
        child: Positions,
        touched: Mask,
        choice: Positions,
        able: Mask,
        rng: Generator,
    ) -> None:
        """Change one of the able sites, drawn at random."""
        site = rng.choice(np.flatnonzero(able))
        child[site] = choice[site]
        touched[site] = True

    def _neighbours(
        self, current: Positions, way: int, rng: Generator
    ) -> tuple[Positions, NDArray[np.float64]]:
        """Draw each site's next choice up (1) or down (-1), with the change of price.

        Infinite where there is none. At least every second one stays in its family.
        """
        here = self._price[self._rows, current][:, None]
        steps = way * (self._price - here)
        own = self._members[:, self._rows, current]
        beyond = (steps > 0) & np.isfinite(steps)
        ahead = self._members & (beyond | ((steps == 0) & ~own[:, :, None]))
        keys = rng.random(own.shape) + own * rng.integers(2, size=len(current))
        family = np.where(ahead.any(axis=2), keys, -1.0).argmax(axis=0)
        mine = ahead[family, self._rows]
        nearest = np.where(mine, steps, np.inf).min(axis=1)
        level = mine & (steps == nearest[:, None])
        choice: Positions = np.where(level, rng.random(level.shape), -1).argmax(axis=1)
        return choice, way * nearest


def draw(problem: Problem, rng: Generator) -> Int[np.ndarray, " sites"]:
    """Draw a policy at random, moved on to the budgets."""
    space = problem.space
    counts = [len(space.choices[site.name]) for site in space.sites]
    anything: Positions = rng.integers(counts)
    if problem.projection is None:
        return anything
    return problem.projection.fit(anything, rng)


def positions(
    space: SearchSpace, trials: Sequence[Trial]
) -> Int[np.ndarray, "trials sites"]:
    """Give the policies of rows as positions of choices, a row a trial."""
    texts = space.distributions().items()
    tables = [(n, {c: i for i, c in enumerate(d.choices)}) for n, d in texts]
    found = [[table[t.params[name]] for name, table in tables] for t in trials]
    return np.array(found, dtype=np.int64).reshape(len(trials), len(tables))


def _families(space: SearchSpace) -> NDArray[np.bool_]:
    """Tell which choices belong to which family, ``[families, sites, choices]``."""
    width = max(len(actions) for actions in space.choices.values())
    named = [[_methods(a) for a in space.choices[s.name]] for s in space.sites]
    families = dict.fromkeys(name for row in named for name in row if name) or {
        (): None
    }
    members = np.zeros((len(families), len(named), width), dtype=bool)
    for family, name in enumerate(families):
        for site, row in enumerate(named):
            members[family, site, : len(row)] = [own in (name, ()) for own in row]
    return members


def _methods(action: Action) -> tuple[str, ...]:
    return tuple(step.method for step in action.steps)
