"""Sequential linear programming over policies, by the gradient at the incumbent.

At a compressed incumbent the gradient of the KL is far from zero, so one backward pass
prices every choice of every site at once. An integer program takes the best set of few
changes within the budgets, one paired evaluation accepts or refuses it, and the step is
repeated from where it led. Ours; the nearest in print are sequential linear programming
(Griffith and Stewart 1961) for the loop, and Levenberg-Marquardt's damping for the
curvature whose weight is fitted to what earlier steps have really changed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from autoprune.hookspecs import hookimpl
from autoprune.searching.allocation import allocate
from autoprune.searching.rows import Trial
from autoprune.searching.rungs import paired
from autoprune.searching.strategies import (
    ExhaustedError,
    PolicySampler,
    SamplerFactory,
    notes_of,
)

NAME = "gradient"

FIRST = 0.3
"""Share of the sites that the first step may change: some 60 of 210."""

GROWS, SHRINKS = 1.5, 0.5
"""What becomes of that share when a step is accepted, and when it is refused."""

FEWEST = 2
"""Changes below which no step shrinks; sets of this size are drawn at random."""

REACH = 0.25
"""Share of a site's choices that one step may go up or down, at least two."""

FADES = 0.5
"""Weight of an earlier incumbent's slopes beside those of the one after it."""

REMEMBERED = 4
"""Incumbents whose slopes are averaged."""

EXPECTED = 1.0
"""Weight of the curvature before steps have told."""

WEIGHTS = (0.25, 4.0)
"""Least and most weight of the curvature that one step can tell of."""

FORGETS = 0.6
"""Share that a step counts of the one after it in the weight of the curvature."""

PATIENCE = 12
"""Steps refused in a row after which the search ends: it is not worth going on."""


class Gradient(PolicySampler):
    """Proposes the set of changes that the slopes at the incumbent promise most of."""

    def propose(self) -> tuple[Int[np.ndarray, " sites"], Mapping[str, Any]]:
        """Give the incumbent with a budget-exact set of changes.

        Raises:
            ExhaustedError: If the last ``PATIENCE`` sets were all refused.
        """
        rng = self.brief.rng()
        if not self.brief.slopes:  # nothing was measured yet: any policy will do
            projection = self.problem.projection
            start = np.zeros(len(self.space.sites), dtype=np.int64)
            return projection.fit(projection.cheapest, rng) if projection else start, {}
        number = max(self.brief.slopes)
        now = self.space.index(self.brief.history[number].policy)
        changes, refused = self._trust()
        if refused >= PATIENCE:
            raise ExhaustedError(f"the last {refused} sets of changes were refused")
        slope, curvature = self._slopes(now)
        costs = slope + self._weight() * curvature
        if changes < FEWEST or refused and changes == FEWEST:
            # The best set is refused: another one, of sites that chance leaves in.
            left_out = rng.random(len(costs)) < 0.5
            costs = np.where(left_out[:, None], np.maximum(costs, 0), costs)
        chosen = allocate(
            self.problem,
            costs,
            now=now,
            changes=max(FEWEST, round(changes)),
            levels=max(2, round(REACH * costs.shape[1])),
        )
        if (projection := self.problem.projection) is not None:
            chosen = projection.fill(chosen, costs, rng)
        rows = np.arange(len(now))
        promised = {
            "linear": float(slope[rows, chosen].sum()),
            "curved": float(curvature[rows, chosen].sum()),
        }
        return chosen, {"base": number, **promised}

    def _trust(self) -> tuple[float, int]:
        """Replay how many changes a step may have, and how many were refused last."""
        free = sum(len(actions) > 1 for actions in self.space.choices.values())
        changes, refused = max(FEWEST, FIRST * free), 0
        for trial in self._steps():
            if trial.number in self.brief.slopes:
                changes, refused = min(free, changes * GROWS), 0
            else:
                changes, refused = max(FEWEST, changes * SHRINKS), refused + 1
        return changes, refused

    def _steps(self) -> list[Trial]:
        return [trial for trial in self.brief.history if "base" in notes_of(trial)]

    def _slopes(
        self, now: Int[np.ndarray, " sites"]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Average the slopes of the last incumbents, as changes from where we are.

        The curvature is the last one's: it is a change's own, from there alone.
        """
        numbers = sorted(self.brief.slopes)[-REMEMBERED:]
        rows, total, weights = np.arange(len(now)), 0.0, 0.0
        slope: Any = 0.0
        for age, number in enumerate(reversed(numbers)):
            found = self.brief.slopes[number].slope.astype(np.float64)
            weights = FADES**age
            slope = slope + weights * (found - found[rows, now][:, None])
            total += weights
        return slope / total, self.brief.slopes[numbers[-1]].curvature.astype(float)

    def _weight(self) -> float:
        """Tell how many times the diagonal curvature the last steps have really met.

        Changes of other sites add to or take from a change's own term: far from any
        optimum dozens of them together meet twice the diagonal, later steps hardly
        more than it. So a step counts the less the longer ago it was.
        """
        met, known = EXPECTED, 1.0
        for trial in self._steps():
            notes = notes_of(trial)
            base = self.brief.history[notes["base"]]
            gap, _ = paired(trial.windows, base.windows)
            if trial.windows and np.isfinite(gap) and notes["curved"] > 0:
                found = np.clip((gap - notes["linear"]) / notes["curved"], *WEIGHTS)
                known = 1 + FORGETS * known
                met += (float(found) - met) / known
        return met


@hookimpl
def register_samplers() -> list[SamplerFactory]:
    """Return the strategy."""
    return [
        SamplerFactory(
            NAME,
            Gradient,
            "steps of a linear program by the gradient at the incumbent; the default",
            needs=frozenset({"slopes"}),
            several=False,
        )
    ]
