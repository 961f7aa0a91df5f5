"""What ends a search."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from autoprune.searching.clock import Clock

Reason = Literal["trials", "time", "disk", "stopped", "exhausted"]
"""Why a search ended: enough trials, no time or no room on the disk for another, told
to, nothing new left."""


def _always() -> bool:
    return True


def _never() -> bool:
    return False


@dataclass(frozen=True, eq=False)
class Ends:
    """When no more trials are begun.

    Attributes:
        trials: Most trials in the ledger, those of before included; None for no end.
        deadline: No trial is begun that on the average would end after this moment of
            the clock; None for no end.
        stop: Asked between trials whether to stop.
        room: Asked between trials whether the disk has room for what comes after them.
        clock: By which the deadline is.
    """

    trials: int | None = None
    deadline: float | None = None
    stop: Callable[[], bool] = _never
    room: Callable[[], bool] = _always
    clock: Clock = Clock()

    def reason(self, begun: int, mean_s: float, *, waiting: bool) -> Reason | None:
        """Say why no trial is to be begun now; None if one may be.

        Args:
            begun: Trials that are begun or done.
            mean_s: What one takes on the average.
            waiting: Whether one of them waits to be begun again.
        """
        if begun >= (self.trials or math.inf) and not waiting:
            return "trials"
        if self.stop():
            return "stopped"
        if self.deadline is not None and self.clock.now() + mean_s > self.deadline:
            return "time"
        return None if self.room() else "disk"
