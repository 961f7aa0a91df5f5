"""What time it is for the scheduler, and how long the parts of a run have taken."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from autoprune.searching.runs import write_text

TIMINGS = "timings.json"
"""In the run folder: seconds that parts of the run have taken."""


class Clock:
    """The time by which budgets run; another one serves to try a night in seconds."""

    def now(self) -> float:
        """Give seconds that only ever grow."""
        return time.monotonic()

    def real(self, seconds: float) -> float:
        """Tell how much time passes by this clock in so many real seconds."""
        return seconds

    def wall(self) -> datetime:
        """Give the local time."""
        return datetime.now().astimezone()


@dataclass(frozen=True)
class FastClock(Clock):
    """A clock that runs so many times faster than the real one.

    Attributes:
        speed: Seconds of this clock in a real second.
    """

    speed: float

    def now(self) -> float:
        """Give accelerated seconds."""
        return self.speed * time.monotonic()

    def real(self, seconds: float) -> float:
        """Tell how much time passes by this clock in so many real seconds."""
        return self.speed * seconds


@dataclass(eq=False)
class Timetable:
    """When a run has to end, and how long its parts have taken.

    Attributes:
        clock: The scheduler's.
        budget: Seconds that the run may take; None for as long as it needs.
        began: When it began, by the clock.
        seconds: What parts have taken, by their name; those of earlier starts of the
            run as well.
    """

    clock: Clock
    budget: float | None
    began: float
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, clock: Clock, budget: float | None) -> "Timetable":
        """Begin to count now."""
        return cls(clock, budget, clock.now())

    def left(self) -> float:
        """Tell how many seconds are left; inf where there is no budget."""
        if self.budget is None:
            return float("inf")
        return self.began + self.budget - self.clock.now()

    def end(self, share: float, reserved: float) -> float | None:
        """Tell when a share of the time ends that is there for trials.

        Args:
            share: From 0 to 1.
            reserved: Seconds that belong to what comes after all trials.
        """
        if self.budget is None:
            return None
        return self.began + share * (self.budget - reserved)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Take the time of a part."""
        start = self.clock.now()
        yield
        self.seconds[name] = self.clock.now() - start

    def recall(self, folder: Path) -> None:
        """Read what parts have taken when the run went on before, if it did."""
        try:
            known: Mapping[str, float] = json.loads((folder / TIMINGS).read_text())
            self.seconds = {name: float(s) for name, s in known.items()} | self.seconds
        except (OSError, ValueError, AttributeError, TypeError):
            return  # it is only an estimate that is worse without

    def keep(self, folder: Path) -> None:
        """Write what parts have taken, for when the run goes on."""
        write_text(folder / TIMINGS, json.dumps(self.seconds, indent=1) + "\n")
