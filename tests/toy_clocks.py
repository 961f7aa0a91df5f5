"""Clocks that a test moves."""

from autoprune.searching.clock import Clock


class Stopped(Clock):
    """Stands until a test moves it."""

    def __init__(self):
        self.at = 100.0

    def now(self):
        return self.at
