"""Workers of a simulation: jobs take what recorded ones took, on a virtual clock."""

import heapq
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from autoprune.searching.clock import Clock
from autoprune.searching.crew import Crew, Job, Outcome, TakeSlopes
from autoprune.searching.plan import Plan
from autoprune.searching.trial import Evaluator

TIMES = Path(__file__).parent / "recorded_times.json"

RESTART_S = 60.0
"""How long a new worker takes until it has loaded all."""


class VirtualClock(Clock):
    """Stands but where it is moved on, and where the driver computes.

    Args:
        driver: Virtual seconds of a CPU second of the driver; 0 for one that takes no
            time.
    """

    def __init__(self, driver: float = 1.0) -> None:
        self.driver = driver
        self.idle_s = 0.0
        self.spared_s = 0.0
        self._began = time.process_time()

    def now(self) -> float:
        """Give virtual seconds since it was made."""
        return self.idle_s + self.driver * self.cpu_s

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the driver."""
        return time.process_time() - self._began - self.spared_s

    def reach(self, moment: float) -> None:
        """Go on to a moment, if it has not come yet."""
        self.idle_s += max(0.0, moment - self.now())


@dataclass(frozen=True)
class Times:
    """How long jobs take, as it was recorded.

    Attributes:
        evaluate_s: Of trials.
        slopes_s: Of all slopes at an incumbent, by one worker.
    """

    evaluate_s: Sequence[float]
    slopes_s: Sequence[float]

    @classmethod
    def recorded(cls, path: Path = TIMES) -> Self:
        """Read them."""
        data = json.loads(path.read_text())
        return cls(data["evaluate_s"], data["slopes_s"])


@dataclass(eq=False)
class SimulatedCrew(Crew):
    """Workers that take as long as recorded ones did, on a virtual clock.

    Attributes:
        evaluator: What measures, in no time.
        clock: The scheduler's.
        size: How many workers.
        times: What durations are drawn from.
        lost: Share of the jobs that lose their worker, after half of their time.
        seed: Of durations and losses.
    """

    evaluator: Evaluator
    clock: VirtualClock
    size: int
    times: Times
    lost: float = 0.0
    seed: int = 0
    busy_s: float = 0.0
    losses: int = 0
    _due: list[tuple[float, int, Job | None, bool]] = field(default_factory=list)
    _taken: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def enter(self, plan: Plan) -> None:
        """Have no part: it is the study that is simulated."""
        raise AssertionError("a simulated study has no plans")

    def idle(self) -> list[int]:
        """Name the workers without a job."""
        return [n for n in range(self.size) if n not in self._taken]

    def submit(self, worker: int, job: Job) -> None:
        """Draw when a job ends."""
        assert worker not in self._taken, f"worker {worker} has a job"
        if isinstance(job, TakeSlopes):
            seconds = float(self._rng.choice(self.times.slopes_s)) / job.part[1]
        else:
            seconds = float(self._rng.choice(self.times.evaluate_s))
        lost = bool(self._rng.random() < self.lost)
        seconds *= 0.5 if lost else 1.0
        self.busy_s += seconds
        self._taken.add(worker)
        heapq.heappush(self._due, (self.clock.now() + seconds, worker, job, lost))

    def wait(self, seconds: float) -> list[Outcome]:
        """Go on to the end of the next job; give all that have ended by then."""
        if not self._due:
            self.clock.reach(self.clock.now() + seconds)
            return []
        self.clock.reach(self._due[0][0])
        now, ended = self.clock.now(), []
        while self._due and self._due[0][0] <= now:
            moment, worker, job, lost = heapq.heappop(self._due)
            if lost:
                self.losses += 1
                again = moment + RESTART_S
                heapq.heappush(self._due, (again, worker, None, False))
                ended.append(Outcome(worker, lost="by the simulation"))
                continue
            self._taken.discard(worker)
            if job is not None:
                ended.append(Outcome(worker, self._done(job)))
        return ended

    def _done(self, job: Job) -> Any:
        """Do a job; what that takes here is not the driver's."""
        start = time.process_time()
        try:
            return job.run(self.evaluator)
        finally:
            self.clock.spared_s += time.process_time() - start
