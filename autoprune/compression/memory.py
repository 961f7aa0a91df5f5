"""Weights of variants in memory: a trial then swaps them without reading a disk."""

import os
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

MEMORY_SHARE = 0.25
"""Most of the machine's memory that the weights of variants may fill."""


def memory_bytes() -> int:
    """Give the cap of the weights in memory: a quarter of what the machine has."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return int(MEMORY_SHARE * pages * size)


class WeightMemory:
    """Weights by the key of their variant; those used longest ago go first.

    Args:
        cap_bytes: Most bytes that they may take.
    """

    def __init__(self, cap_bytes: int) -> None:
        self.cap_bytes = cap_bytes
        self.held_bytes = 0
        self._weights: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str, read: Callable[[], Tensor]) -> Tensor:
        """Give a weight, reading it if it is not held. Not to be written to."""
        if key in self._weights:
            self._weights.move_to_end(key)
            return self._weights[key]
        weight = read()
        self._weights[key] = weight
        self.held_bytes += weight.nbytes
        while self.held_bytes > self.cap_bytes and self._weights:
            _, gone = self._weights.popitem(last=False)
            self.held_bytes -= gone.nbytes
        return weight
