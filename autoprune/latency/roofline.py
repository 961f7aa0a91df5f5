"""The roofline of a kernel: what it needs at least, and how far from that it is.

``t = t0 + ((F / P)^3 + (B / W)^3)^(1/3)`` for F operations and B bytes: between the
two limits a kernel is a little slower than either alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_POWER = 3

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Roof:
    """The ceilings of a kernel.

    Attributes:
        compute: Operations a microsecond.
        bandwidth: Bytes a microsecond.
        overhead: Microseconds that every call takes.
    """

    compute: float
    bandwidth: float
    overhead: float = 0.0

    def us(self, flop: float, moved: float) -> float:
        """Give the microseconds of a call."""
        smooth = (flop / self.compute) ** _POWER + (moved / self.bandwidth) ** _POWER
        return float(self.overhead + smooth ** (1 / _POWER))

    def floor(self, flop: float, moved: float) -> float:
        """Give the microseconds that no call can be under."""
        return float(max(flop / self.compute, moved / self.bandwidth))


def fit_roof(flop: Array, moved: Array, us: Array) -> Roof:
    """Fit a roof to timings, by the least sum of absolute errors of the logarithm.

    A pattern search from the best values that were reached: deterministic, and so
    robust that a few timings under load do no harm.

    Args:
        flop: Operations of each call.
        moved: Bytes that each call moves.
        us: Microseconds of each call, all positive.
    """
    start = np.log([(flop / us).max(), (moved / us).max(), us.min() / 2 + 1e-3])
    flop, moved, wanted = (np.asarray(one, float) for one in (flop, moved, np.log(us)))

    def loss(at: Array) -> float:
        compute, bandwidth, overhead = np.exp(at)
        smooth = (flop / compute) ** _POWER + (moved / bandwidth) ** _POWER
        error = np.log(overhead + smooth ** (1 / _POWER)) - wanted
        return float(np.abs(error).mean())

    compute, bandwidth, overhead = np.exp(_pattern_search(loss, start))
    return Roof(float(compute), float(bandwidth), float(overhead))


def _pattern_search(loss: Callable[[Array], float], start: Array) -> Array:
    """Descend along the axes and the diagonals, with steps that halve."""
    steps = [np.array(way, float) for way in np.ndindex(3, 3, 3)]
    ways = [way - 1 for way in steps if np.any(way != 1)]
    best, low, size = start, loss(start), 0.5
    while size > 1e-3:
        tried = [best + size * way for way in ways]
        losses = [loss(one) for one in tried]
        least = int(np.argmin(losses))
        if losses[least] < low - 1e-9:
            best, low = tried[least], losses[least]
        else:
            size /= 2
    return best
