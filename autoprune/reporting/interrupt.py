"""Ctrl-C: the first ends a search after the running trial, the second at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from autoprune.reporting.observer import SEARCHING


class Interrupt:
    """Hears Ctrl-C, and tells a search whether to stop.

    Between trials there is something to wait for; in all other stages what is done is
    on disk, so that the first Ctrl-C ends them at once.

    Args:
        stage: Tells the stage that goes on.
        told: Called once the search is asked to stop.
    """

    def __init__(
        self, stage: Callable[[], str | None], told: Callable[[str], None]
    ) -> None:
        self._stage = stage
        self._told = told
        self.asked = False

    def __call__(self) -> bool:
        """Tell whether the search shall stop."""
        return self.asked

    def hear(self, signum: int, frame: FrameType | None) -> None:
        """Take a signal: note it, or raise ``KeyboardInterrupt``."""
        if self.asked or self._stage() != SEARCHING:
            raise KeyboardInterrupt
        self.asked = True
        self._told("finishing the running trial; Ctrl-C again stops at once")

    @contextmanager
    def listening(self) -> Iterator["Interrupt"]:
        """Hear Ctrl-C for as long as the block runs."""
        before = signal.signal(signal.SIGINT, self.hear)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)
