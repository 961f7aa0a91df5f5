"""Times of one kernel between the points that were measured.

What is interpolated is not the time but how far it is above the kernel's roofline: that
changes slowly from shape to shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoprune.latency.estimate import Z_80, Tier
from autoprune.latency.roofline import Roof, fit_roof

Array = NDArray[np.float64]

NEIGHBOURS = 4
REACH_OCTAVES = 2.0
"""How far, in powers of two, a shape may be from any that was measured."""

REGIMES = (16, 256)
"""Tokens at which kernels change their ways: few, some, many."""

EXACT_OWN, EXACT_SHARED = 0.02, 0.02
"""Errors of what was measured itself: it would come out so again."""

LEAST_OWN, LEAST_SHARED = 0.03, 0.02
"""Errors of what is interpolated are never told smaller than this."""

FAR_FROM_ALL = 2.0
"""How many times the error of neighbours that of the bare roofline is told to be."""

CEILING = 0.9
"""No interpolated time is under so much of what the ceilings allow."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A timing as a table keeps it.

    Attributes:
        rows: What grows with the tokens: the key along which a curve runs.
        place: What else tells shapes apart, as logarithms to the base of 2.
        flop: Operations.
        moved: Bytes.
        us: Microseconds.
    """

    rows: float
    place: tuple[float, ...]
    flop: float
    moved: float
    us: float


@dataclass(frozen=True, slots=True)
class Found:
    """What a table says of a shape: microseconds, and the errors of the logarithm."""

    us: float
    own: float
    shared: float
    tier: Tier


@dataclass(frozen=True, eq=False)
class Table:
    """All points of one kernel.

    Attributes:
        samples: At least one.
    """

    samples: Sequence[Sample]

    @cached_property
    def roof(self) -> Roof:
        """The kernel's roofline, as its points have it."""
        flop, moved, us = (
            np.array([getattr(one, name) for one in self.samples])
            for name in ("flop", "moved", "us")
        )
        return fit_roof(flop, moved, us)

    def find(
        self, rows: float, place: tuple[float, ...], flop: float, moved: float
    ) -> Found:
        """Tell the time of a shape.

        Args:
            rows: Tokens.
            place: What else tells it from others.
            flop: Operations.
            moved: Bytes.
        """
        known = self._exact.get((rows, place))
        if known is not None:
            return Found(known, EXACT_OWN, EXACT_SHARED, Tier.TABLE_EXACT)
        above, tier = self._above(rows, place)
        own, shared = self.errors[_regime(rows)]
        if tier is Tier.ROOFLINE_CALIBRATED:
            own, shared = FAR_FROM_ALL * own, FAR_FROM_ALL * shared
        roof = self.roof
        us = max(
            roof.us(flop, moved) * float(np.exp(above)),
            CEILING * self._best.floor(flop, moved),
        )
        return Found(us, own, shared, tier)

    @cached_property
    def errors(self) -> dict[int, tuple[float, float]]:
        """Own and shared error by regime, from each place foretold by the others.

        A place's mean error stands for what is its own; the mean over all places, and
        how little that is known from few of them, for what they share.
        """
        found: dict[int, list[float]] = {regime: [] for regime in range(3)}
        for place, curve in self._curves.items():
            others = {p: c for p, c in self._curves.items() if p != place}
            for rows, true in zip(*curve, strict=True):
                if others:
                    guess, _ = _nearest(others, rows, place)
                    found[_regime(2**rows)].append(guess - true)
        everything = [error for errors in found.values() for error in errors]
        return {
            regime: _two_errors(errors if len(errors) >= NEIGHBOURS else everything)
            for regime, errors in found.items()
        }

    @cached_property
    def _exact(self) -> dict[tuple[float, tuple[float, ...]], float]:
        return {(one.rows, one.place): one.us for one in self.samples}

    @cached_property
    def _best(self) -> Roof:
        """The ceilings that any point has reached."""
        compute = max(one.flop / one.us for one in self.samples)
        bandwidth = max(one.moved / one.us for one in self.samples)
        return Roof(max(compute, 1e-9), max(bandwidth, 1e-9))

    @cached_property
    def _curves(self) -> dict[tuple[float, ...], tuple[Array, Array]]:
        """Log time over the roofline along the log of tokens, place by place."""
        grouped: dict[tuple[float, ...], list[tuple[float, float]]] = {}
        for one in self.samples:
            above = np.log(one.us / self.roof.us(one.flop, one.moved))
            grouped.setdefault(one.place, []).append((np.log2(one.rows), above))
        found = {}
        for place, pairs in grouped.items():
            rows, above = np.array(sorted(pairs)).T
            found[place] = (rows, above)
        return found

    def _above(self, rows: float, place: tuple[float, ...]) -> tuple[float, Tier]:
        at = float(np.log2(rows))
        if place in self._curves:
            curve = self._curves[place]
            return float(np.interp(at, *curve)), Tier.TABLE_INTERPOLATED
        above, distance = _nearest(self._curves, at, place)
        if distance > REACH_OCTAVES:
            return 0.0, Tier.ROOFLINE_CALIBRATED
        return above, Tier.TABLE_INTERPOLATED


def _nearest(
    curves: dict[tuple[float, ...], tuple[Array, Array]],
    at: float,
    place: tuple[float, ...],
) -> tuple[float, float]:
    """Weigh the nearest curves by distance; tell also how far the very nearest is."""
    places = list(curves)
    away = np.linalg.norm(np.array(places) - np.array(place), axis=1)
    order = np.argsort(away, kind="stable")[:NEIGHBOURS]
    weights = 1 / np.maximum(away[order], 1e-6)
    values = [np.interp(at, *curves[places[index]]) for index in order]
    return float(weights @ values / weights.sum()), float(away[order[0]])


def _regime(rows: float) -> int:
    return int(sum(rows > limit for limit in REGIMES))


def _two_errors(errors: Sequence[float]) -> tuple[float, float]:
    """Give own and shared error: 80 % of the errors lie within ``Z_80`` of them."""
    if not errors:  # one place alone tells nothing of others
        return 0.2, 0.1
    values = np.array(errors)
    common = float(np.median(values))
    own = float(np.quantile(np.abs(values - common), 0.8)) / Z_80
    shared = abs(common) + own / len(values) ** 0.5
    return max(own, LEAST_OWN), max(shared, LEAST_SHARED)
