"""A trial that is being measured: asked for, and not yet a row that is finished."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from autoprune.searching.asking import Asked
from autoprune.searching.crew import Measure
from autoprune.searching.judge import Course, Judge
from autoprune.searching.objective import Objective
from autoprune.searching.rows import Trial, utc_now
from autoprune.searching.trial import Score


@dataclass(eq=False)
class Underway:
    """A trial that a worker has, or that waits for another one.

    Attributes:
        asked: What was asked for.
        judge: Says what to measure of it, and how it ended.
        now: The scheduler's clock.
        timings: Seconds by part of the trial, so far.
        deaths: Workers that were lost in the middle of it.
    """

    asked: Asked
    judge: Judge
    now: Callable[[], float]
    timings: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("slopes_s", "propose_s", "put_s", "evaluate_s"), 0.0
        )
    )
    deaths: int = 0
    _began: float | None = None
    _course: Course | None = None

    def begin(self) -> Measure:
        """Begin to measure it, from its start; give what comes first."""
        self._began, asked = self.now(), self.asked
        self._course = self.judge.course(asked.trial, asked.row.policy, asked.rung)
        return next(self._course)

    def go_on(self, score: Score) -> Measure | tuple[Score, bool]:
        """Take in a score; give what to measure next, or the last score.

        Returns:
            What to measure; or the score that it ends with, and True if that is of the
            whole split.
        """
        assert self._course is not None
        self.timings["put_s"] += score.put_s
        self.timings["evaluate_s"] -= score.put_s
        try:
            return self._course.send(score)
        except StopIteration as ended:
            found: tuple[Score, bool] = ended.value
            return found

    def lose(self) -> None:
        """Take note that its worker was lost."""
        self.deaths += 1
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self._began is not None:
            self.timings["evaluate_s"] += self.now() - self._began
        self._began = None

    @property
    def number(self) -> int:
        """Its number."""
        return self.asked.row.number

    @property
    def seconds(self) -> float:
        """How long it took, slopes and proposal included."""
        return math.fsum(self.timings.values())

    def row(
        self,
        objective: Objective,
        score: Score,
        *,
        whole: bool = False,
        error: Exception | None = None,
    ) -> Trial:
        """Give its finished row."""
        self._stop_clock()
        state, values = self.judge.verdict(score, error, whole)
        limits = objective.limits if error is None else ()
        return replace(
            self.asked.row,
            state=state,
            finished=utc_now(),
            values=values,
            metrics=score.metrics,
            constraints={one.metric: one.excess(score.metrics) for one in limits},
            timings=self.timings,
            windows=score.windows,
            error=f"{type(error).__name__}: {error}" if error else None,
        )
