"""Judges proposals: says what to measure of each, and tells how each trial ended."""

import logging
import math
from collections.abc import Generator, Sequence

import numpy as np
import optuna

from autoprune.policy import Policy
from autoprune.searching.crew import Measure
from autoprune.searching.objective import WORST, Objective
from autoprune.searching.rows import State, Trial
from autoprune.searching.rungs import (
    Pruner,
    gives_up,
    incumbents,
    paired,
    replaces,
)
from autoprune.searching.trial import Score

log = logging.getLogger(__name__)

Course = Generator[Measure, Score, tuple[Score, bool]]
"""The way of a trial: yields what to measure, is sent what that scored, and returns the
last score and whether it is of the whole split."""

FAILURES = 3
"""Trials that may fail in a row; then the error is no accident of one policy."""


class Judge:
    """Has policies measured, beside the incumbent that they have to beat.

    Args:
        objective: What is wanted.
        rungs: Windows at which a trial may end; empty for no rungs.
        pruner: What ends it there.
        trials: All trials so far; grows as they are added to it.

    Attributes:
        incumbent: The best trial, by a paired test where windows are known; None before
            the first that is feasible, and where there are several goals.
    """

    def __init__(
        self,
        objective: Objective,
        rungs: tuple[int, ...],
        pruner: Pruner,
        trials: Sequence[Trial],
    ) -> None:
        self._objective = objective
        self._rungs = rungs
        self._pruner = pruner
        self._trials = trials
        self._failed: list[Exception] = []
        held = incumbents(trials, objective) if objective.single else []
        self.incumbent = next((t for t in trials if t.number in held[-1:]), None)

    def consider(self, trial: Trial) -> None:
        """Make a trial the incumbent if it takes its place."""
        if self._objective.single and trial.feasible:
            best = self.incumbent
            if best is None or replaces(trial, best, self._objective):
                self.incumbent = trial

    def raise_if_failing(self) -> None:
        """Raise the last error if the last trials all failed."""
        if len(self._failed) >= FAILURES:
            raise self._failed[-1]

    def course(self, asked: optuna.Trial, policy: Policy, wanted: int | None) -> Course:
        """Measure a policy up the rungs: yields what is to be measured next.

        Args:
            asked: The running trial.
            policy: Its policy.
            wanted: The rung that its strategy asks for: then all of its windows, as the
                strategy compares by itself. None to climb while the pruner lets it.

        Returns:
            What it scored, and True if it was measured on the whole split.
        """
        reported, whole = 0, False
        near = self.incumbent.policy if self.incumbent else None
        climb = range(len(self._rungs) or 1)
        for rung in climb if wanted is None else (wanted,):
            whole = rung == climb[-1]
            score = yield Measure(policy, None if whole else self._rungs[rung], near)
            if whole or wanted is not None or not _is_finite(score):
                break
            told = score.windows, self.incumbent, reported
            if gives_up(self._pruner, asked, *told):
                break
            reported = len(score.windows)
        return score, whole

    def hear(self, number: int, error: Exception | None) -> None:
        """Hear how the measuring of a trial ended."""
        if error is None:
            self._failed.clear()
            return
        log.warning("trial %d failed: %s", number, error, exc_info=error)
        self._failed.append(error)

    def verdict(
        self, score: Score, error: Exception | None, whole: bool
    ) -> tuple[State, tuple[float, ...]]:
        """Tell how a trial ended, and what the study shall learn of it."""
        if error is not None:
            return "failed", ()
        values = self._objective.values(score.metrics)
        if not _is_finite(score):
            told = [
                value if math.isfinite(value) else self._worse_than_all(goal)
                for goal, value in enumerate(values)
            ]
            return "diverged", tuple(told)
        if whole:
            return "complete", values
        return "pruned", self._as_if_whole(values, score)

    def _as_if_whole(
        self, values: tuple[float, ...], score: Score
    ) -> tuple[float, ...]:
        """Tell of a KL on few windows what it would be on all: they differ in hardness.

        What the incumbent has on all is moved by the difference on those that both saw.
        """
        if self.incumbent is None or not self.incumbent.windows:
            return values
        gap, _ = paired(score.windows, self.incumbent.windows)
        moved = float(np.mean(self.incumbent.windows)) + gap
        return tuple(
            moved if name == "kl" else value
            for value, (name, _) in zip(values, self._objective.goals, strict=True)
        )

    def _worse_than_all(self, goal: int) -> float:
        """Make up a finite value that is worse than any seen."""
        sign = 1 if self._objective.goals[goal][1] == "minimize" else -1
        seen = [sign * t.values[goal] for t in self._trials if t.state == "complete"]
        worst = max(seen) + max(1.0, abs(max(seen))) if seen else WORST
        return sign * worst


def _is_finite(score: Score) -> bool:
    """Tell whether a policy has not diverged on the windows that it was measured on."""
    return all(math.isfinite(value) for value in score.metrics.values())
