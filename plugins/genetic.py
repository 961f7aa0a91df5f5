"""A genetic algorithm whose children have their parents' genes and meet the budgets."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.random import Generator
from numpy.typing import NDArray

from autoprune.errors import BudgetError
from autoprune.hookspecs import hookimpl
from autoprune.searching.projection import Projection
from autoprune.searching.rows import Trial
from autoprune.searching.space import SearchSpace
from autoprune.searching.strategies import PolicySampler, SamplerFactory
from autoprune.searching.switches import (
    LevelSwitches,
    draw,
    positions,
)

POPULATION = 16
"""Policies that may become parents; some 300 trials are all there is."""

FRONT = 32
"""Of them with several objectives, when they have to span the front."""

TOURNAMENT = 3
"""Policies drawn for each parent, of which the best is taken."""

FOUNDERS = 12
"""Switches by which the first policies leave a good one: far enough to cross."""

BLOCKWISE = 0.5
"""Share of children that take a run of whole blocks, not sites, from a parent."""

ATTEMPTS = 16
"""Children drawn until one is new, before the last is given as it is."""


class GeneticSampler(PolicySampler):
    """Crosses good policies of the history and mutates the child.

    A steady state: the best ``POPULATION`` policies so far are the population, whoever
    proposed them; parents are winners of tournaments. A child takes each site from
    either parent (uniform), or a run of blocks from one and the rest from the other.
    Where it misses the budgets it is moved on to them among its parents' genes, which
    keeps what both agree on; then a level switch or a few mutate it. Unlike NSGA-II
    (Deb et al., 2002), several objectives are served by the rank of the front and,
    inside a front, a scalarisation drawn anew for every proposal.

    Before there is a population, proposals are good policies changed at many sites, or
    random ones where nothing is known. All values are taken as minimised.
    """

    def propose(self) -> tuple[Int[np.ndarray, " sites"], Mapping[str, Any]]:
        """Give a child of two good policies."""
        rng = self.brief.rng()
        rows, indices = _distinct(self.space, self.brief.history)
        if not rows:
            return draw(self.problem, rng), {}
        ranked = indices[_ranking(rows, rng)]
        known = {row.tobytes() for row in indices}
        switches = LevelSwitches(self.problem)
        for _ in range(ATTEMPTS):
            child, full = self._child(ranked, switches, rng)
            if full and child.tobytes() not in known:
                return child, {}
        projection = self.problem.projection
        return child if projection is None else projection.fit(child, rng), {}

    def _child(
        self, ranked: NDArray[np.int64], switches: LevelSwitches, rng: Generator
    ) -> tuple[NDArray[np.int64], bool]:
        """Make a child, and tell whether it fills the budgets as its parents do."""
        size = POPULATION if self.brief.objectives == 1 else FRONT
        if len(ranked) < size:
            one = ranked[rng.integers(1 + len(ranked) // 4)]
            far = min(FOUNDERS, max(3, len(one) // 8))
            child = switches.mutate(one, rng, switches=far)
        else:
            one, other = (ranked[_winner(size, rng)] for _ in range(2))
            child = switches.mutate(self._cross(one, other, rng), rng)
        return child, switches.as_full(child, one)

    def _cross(
        self, one: NDArray[np.int64], other: NDArray[np.int64], rng: Generator
    ) -> NDArray[np.int64]:
        """Make a child of the genes of two parents, and within the budgets."""
        if rng.random() < BLOCKWISE:
            taken = _segment(self.space, rng)
        else:
            taken = rng.random(len(one)) < 0.5
        child: NDArray[np.int64] = np.where(taken, one, other)
        problem, both = self.problem, np.stack([one, other])
        if not problem.budgets:
            return child
        try:
            among = Projection(
                problem.space, problem.prices, problem.budgets, among=both
            )
        except BudgetError:  # several budgets that pull apart, and no mix was found
            return one
        return among.fit(child, rng)


def _distinct(
    space: SearchSpace, history: Sequence[Trial]
) -> tuple[list[Trial], NDArray[np.int64]]:
    """Keep the complete rows, each policy once."""
    rows = [trial for trial in history if trial.state == "complete"]
    indices = positions(space, rows)
    first: dict[bytes, int] = {}
    for row, own in enumerate(indices):
        first.setdefault(own.tobytes(), row)
    kept = list(first.values())
    return [rows[row] for row in kept], indices[kept]


def _ranking(rows: Sequence[Trial], rng: Generator) -> NDArray[np.int64]:
    """Order rows from the best: limits kept, then front, then a random scalarisation.

    Objectives are weighed by ranks, so that their units do not matter.
    """
    broken = [sum(max(0.0, v) for v in t.constraints.values()) for t in rows]
    values = np.array([trial.values for trial in rows])
    ranks = values.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    score = ranks @ rng.dirichlet(np.ones(values.shape[1]))
    order: NDArray[np.int64] = np.lexsort(np.stack([score, _fronts(values), broken]))
    return order


def _fronts(values: Float[np.ndarray, "rows goals"]) -> Int[np.ndarray, " rows"]:
    """Number the fronts: 0 where nothing is better in all, 1 without these, and on."""
    if values.shape[1] == 1:
        return np.zeros(len(values), dtype=np.int64)
    no_worse = np.all(values[:, None] <= values[None], axis=2)
    better = no_worse & np.any(values[:, None] < values[None], axis=2)
    fronts = np.full(len(values), -1)
    left = np.ones(len(values), dtype=bool)
    front = 0
    while left.any():
        here = left & ~better[left].any(axis=0)
        fronts[here] = front
        left &= ~here
        front += 1
    return fronts


def _winner(size: int, rng: Generator) -> int:
    """Draw the best of a tournament among the first so many of a ranking."""
    return int(rng.integers(size, size=TOURNAMENT).min())


def _segment(space: SearchSpace, rng: Generator) -> NDArray[np.bool_]:
    """Mark the sites of a run of blocks, drawn at random; it may go round the end."""
    blocks = [site.layers[0].block for site in space.sites]
    depth = np.array([-1 if block is None else block for block in blocks])
    _, place = np.unique(depth, return_inverse=True)
    count = int(place.max()) + 1
    start, length = rng.integers(count), rng.integers(1, max(2, count))
    marked: NDArray[np.bool_] = (place - start) % count < length
    return marked


@hookimpl
def register_samplers() -> list[SamplerFactory]:
    """Return the strategy."""
    return [
        SamplerFactory(
            "genetic", GeneticSampler, "crosses good policies; one objective or several"
        )
    ]
