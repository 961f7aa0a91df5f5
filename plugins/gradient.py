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
from autoprune.searching.curvature import kind_of
from autoprune.searching.rows import Trial
from autoprune.searching.rungs import paired
from autoprune.searching.strategies import (
    ExhaustedError,
    PolicySampler,
    SamplerFactory,
    notes_of,
)
from autoprune.searching.tracking import tracked

NAME = "gradient"

FIRST = 0.3
"""Share of the sites that the first step may change: some 60 of 210."""

GROWS, SHRINKS = 1.5, 0.5
"""What becomes of that share when a step is accepted, and when it is refused."""

FEWEST = 2
"""Changes below which no step shrinks; sets of this size are drawn at random."""

REACH = 0.25
"""Share of a site's choices that one step may go up or down, at least two."""

MUCH = 0.25
"""Share of what it promised that a refused step has to give, not to be too large."""

EXPECTED = 0.5
"""Weight of the curvature before steps have told: the first ones may be bold."""

WEIGHTS = (0.25, 1.0)
"""Least and most weight of the curvature that one step can tell of. Dozens of changes
together meet up to twice the diagonal, yet a step that counts so much is small, and
what a small one gains is not told from noise: one search at 70 % zeros that counted up
to 4 times, and 1.0 at first, had KL 1.325 after 155 CPU s, this one 1.262."""

BOLDER = (0.5, 0.25)
"""Shares of that weight that are tried where no change is worth all of it, and where
steps were too small to be told from noise."""

FORGETS = 0.6
"""Share that a step counts of the one after it in the weight of the curvature."""

PATIENCE = 10
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
        now = self.space.index(self.brief.row(number).policy)
        changes, boldness, refused = self._trust()
        if refused >= PATIENCE:
            raise ExhaustedError(f"the last {refused} sets of changes were refused")
        for notes in self._underway(number):
            # Wherever it ends, the set that follows its refusal is worth a look.
            changes = max(FEWEST, min(changes, notes["changes"]) * SHRINKS)
            refused += 1
        slope, curvature = self._slopes()
        left_out = np.zeros(len(now), dtype=bool)
        if changes < FEWEST or refused and changes == FEWEST:
            # The best set is refused: another one, of sites that chance leaves in.
            left_out = rng.random(len(now)) < 0.5
        weight = self._weight() * boldness
        for bolder in (1.0, *BOLDER):
            costs = slope + bolder * weight * curvature
            costs = np.where(left_out[:, None], np.maximum(costs, 0), costs)
            chosen = allocate(
                self.problem,
                costs,
                now=now,
                changes=max(FEWEST, round(changes)),
                levels=self._reach(costs.shape[1]),
            )
            if (chosen != now).any():  # else nothing is worth its curvature
                break
        if (projection := self.problem.projection) is not None:
            chosen = projection.fill(chosen, costs, rng)
        rows = np.arange(len(now))
        return chosen, {
            "base": number,
            "changes": int((chosen != now).sum()),
            "promised": float(costs[rows, chosen].sum()),
            "linear": float(slope[rows, chosen].sum()),
            "curved": float(curvature[rows, chosen].sum()),
        }

    def _trust(self) -> tuple[float, float, int]:
        """Replay how many changes a step may have.

        A step that gave much of what it promised, but less than the noise of its
        windows, was too small: what comes next counts less of the curvature. One that
        gave little was too large.

        Returns:
            Most changes, the share of the curvature that counts, and how many steps
            were refused last.
        """
        free = sum(len(actions) > 1 for actions in self.space.choices.values())
        changes, boldness, refused = max(FEWEST, FIRST * free), 1.0, 0
        held = -1
        for trial in self._steps():
            notes = notes_of(trial)
            held = max(held, notes["base"])
            if notes["base"] < held and trial.number not in self.brief.slopes:
                continue  # another worker's, of an incumbent that was left meanwhile
            base = self.brief.row(notes["base"])
            gap, _ = paired(trial.windows, base.windows)
            if trial.number in self.brief.slopes:
                changes, boldness, refused = min(free, changes * GROWS), 1.0, 0
                held = trial.number
            elif trial.windows and gap < MUCH * notes["promised"] < 0:
                boldness, refused = max(BOLDER[-1], boldness * BOLDER[0]), refused + 1
            else:
                changes = max(FEWEST, min(changes, notes["changes"]) * SHRINKS)
                boldness, refused = 1.0, refused + 1
        return changes, boldness, refused

    def _steps(self) -> list[Trial]:
        # A run that an older version began has steps that did not note their promise.
        return [trial for trial in self.brief.history if "promised" in notes_of(trial)]

    def _underway(self, number: int) -> list[dict[str, Any]]:
        """Give the notes of steps from the incumbent that are being measured."""
        noted = [notes_of(trial) for trial in self.brief.pending]
        return [notes for notes in noted if notes.get("base") == number]

    def _slopes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Estimate the slopes at the incumbent; give the curvature taken there.

        The curvature is the last one's: it is a change's own, from there alone.
        """
        numbers = sorted(self.brief.slopes)
        seen = [
            (self.space.index(self.brief.row(n).policy), self.brief.slopes[n])
            for n in numbers
        ]
        kinds = [kind_of(site.name) for site in self.space.sites]
        curvature = self.brief.slopes[numbers[-1]].curvature.astype(float)
        return tracked(seen, kinds, self._reach(curvature.shape[1])), curvature

    @staticmethod
    def _reach(choices: int) -> int:
        return max(2, round(REACH * choices))

    def _weight(self) -> float:
        """Tell how many times the diagonal curvature the last steps have really met.

        Changes of other sites add to or take from a change's own term, at first more
        than later. So a step counts the less the longer ago it was.
        """
        met, known = EXPECTED, 1.0
        for trial in self._steps():
            notes = notes_of(trial)
            base = self.brief.row(notes["base"])
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
