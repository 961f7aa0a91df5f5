"""How sparsity grows over the steps of a training: pure functions of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from autoprune.errors import ConfigError, unknown_name

_STEEPNESS = 5.0
"""Of the exponential ramp: 0.7 % of the way are left before it is set to its end."""


def _constant(part: float) -> float:
    return 1.0


def _linear(part: float) -> float:
    return part


def _exponential(part: float) -> float:
    return math.expm1(-_STEEPNESS * part) / math.expm1(-_STEEPNESS)


def _cubic(part: float) -> float:
    return 1.0 - (1.0 - part) ** 3


_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "exponential": _exponential,
    "cubic": _cubic,
}

RAMPS = tuple(_SHAPES)
"""Shapes of a ramp, by name."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """A sparsity that grows from one value to another, in equal intervals.

    ``cubic`` is Eq. 1 of Zhu and Gupta (arXiv:1710.01878), ``s_f + (s_i - s_f) (1 -
    (t - t_0) / (n dt))**3``: fast at first, when much is redundant. ``exponential``
    closes the same share of what is left at every step, as a constant rate of pruning
    does; it is stretched so that it ends. ``constant`` is at its end from its first
    step on.

    Differs from the paper in one point: the last step need not be a whole number of
    intervals after the first. The sparsity is exactly ``final`` from it on.

    Args:
        kind: One of ``RAMPS``.
        initial: Sparsity before the ramp, in [0, 1].
        final: Sparsity after it, in [``initial``, 1].
        start: Its first step, from 0.
        end: Its last step, at or after ``start``.
        interval: Steps from one pruning to the next, at least 1.

    Raises:
        ConfigError: If one of these lies out of its range; names it.

    Example:
        >>> ramp = Ramp("cubic", initial=0.0, final=0.8, start=0, end=4)
        >>> [round(ramp.sparsity(step), 4) for step in range(6)]
        [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    """

    kind: str = "cubic"
    initial: float = 0.0
    final: float = 0.5
    start: int = 0
    end: int = 0
    interval: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _SHAPES:
            raise ConfigError(unknown_name("ramp", self.kind, _SHAPES))
        if not 0.0 <= self.initial <= self.final <= 1.0:
            raise ConfigError(
                "the sparsity of a ramp grows within [0, 1], found initial "
                f"{self.initial} and final {self.final}. Swap them, or give shares."
            )
        if not 0 <= self.start <= self.end:
            raise ConfigError(
                f"a ramp goes from step 0 or later to its end, found start {self.start}"
                f" and end {self.end}"
            )
        if self.interval < 1:
            raise ConfigError(
                f"the interval of a ramp is at least 1 step, found {self.interval}"
            )

    def sparsity(self, step: int) -> float:
        """Give the sparsity that holds after a step's pruning.

        It never falls, stays within [``initial``, ``final``], changes at the steps of
        ``prunes_at`` only, and is exactly ``initial`` before ``start`` and exactly
        ``final`` from ``end`` on.

        Args:
            step: Of the optimizer, from 0.
        """
        if step >= self.end:
            return self.final
        if step < self.start:
            return self.initial
        done = (step - self.start) // self.interval * self.interval
        share = _SHAPES[self.kind](done / (self.end - self.start))
        if share == 1.0:  # initial + (final - initial) may be off by a rounding
            return self.final
        return min(self.final, self.initial + (self.final - self.initial) * share)

    def prunes_at(self, step: int) -> bool:
        """Tell whether weights are pruned at a step, so that masks are made anew."""
        if step == self.end:
            return True
        inside = self.start <= step < self.end
        return inside and (step - self.start) % self.interval == 0
