"""What a run tells while it goes on; by default it goes to the log."""

import logging
from collections.abc import Sequence
from typing import Any

log = logging.getLogger("autoprune")

SEARCHING = "searching"
"""Name of the stage in which trials are made; between them a run can be stopped."""


class Observer:
    """Hears what a run does. Subclass it to draw progress.

    Life of a stage: ``stage`` once, then ``advance`` any number of times.
    """

    def stage(self, name: str) -> None:
        """Hear that a part of the run begins."""
        log.info("%s", name)

    def advance(self, done: int, total: int | None) -> None:
        """Hear how far the stage is; ``total`` is None where nobody knows."""

    def aim(self, goals: Sequence[tuple[str, str]], trials: Sequence[Any] = ()) -> None:
        """Hear which metrics are wanted, each with its direction, before trials.

        Args:
            goals: Metric and direction.
            trials: What a run that goes on has already.
        """

    def trial(self, row: Any) -> None:
        """Hear of a finished trial, after its row is on disk."""

    def note(self, text: str) -> None:
        """Hear something worth telling the user."""
        log.info("%s", text)
