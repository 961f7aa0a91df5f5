"""A predicted time: what it is made of, how it is known, and how sure it is.

The error of each operation is log-normal and has two parts: one of its shape, and one
that all calls of a kernel share, which does not average out over layers. In a ratio of
two estimates what they have in common cancels, so it is surer than either.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from math import exp, inf, log

Z_80 = 1.2816
"""Standard deviations on either side that hold 80 % of a normal distribution."""


class Tier(IntEnum):
    """How a time is known, the surest first."""

    TABLE_EXACT = 0
    TABLE_INTERPOLATED = 1
    TABLE_TRANSFERRED = 2
    ROOFLINE_CALIBRATED = 3
    ROOFLINE_DATASHEET = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Term:
    """The time of one operation.

    Attributes:
        part: ``linears``, ``attention``, ``head``, ``rest`` or ``launch``.
        kernel: What it runs on; its calls share an error.
        shape: What tells it from other calls of the kernel.
        us: Microseconds.
        own: Standard deviation of the logarithm of its error, of its shape alone.
        shared: The same of what all calls of the kernel have in common.
        tier: How it is known.
        warnings: What a user should know.
    """

    part: str
    kernel: str
    shape: tuple[int, ...]
    us: float
    own: float
    shared: float
    tier: Tier
    warnings: tuple[str, ...] = ()

    def __hash__(self) -> int:
        # Fewer fields than make two of them equal: a forecast looks up thousands.
        return hash((self.kernel, self.shape, self.us))


@dataclass(frozen=True, eq=False)
class Estimate:
    """A predicted time.

    Attributes:
        terms: How often each operation runs.
    """

    terms: Mapping[Term, float]

    @cached_property
    def ms(self) -> float:
        """Milliseconds."""
        return sum(count * term.us for term, count in self.terms.items()) / 1e3

    @cached_property
    def sigma(self) -> float:
        """Standard deviation of the logarithm of its error."""
        return _sigma([(self, 1.0)])

    @property
    def interval(self) -> tuple[float, float]:
        """Milliseconds between which the time lies in 80 of 100 cases."""
        return self.ms * exp(-Z_80 * self.sigma), self.ms * exp(Z_80 * self.sigma)

    @property
    def tier(self) -> Tier:
        """The worst tier of any operation."""
        return max((term.tier for term in self.terms), default=Tier.TABLE_EXACT)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the time that is known by each tier."""
        found: dict[str, float] = defaultdict(float)
        for term, count in self.terms.items():
            found[str(term.tier)] += count * term.us / 1e3 / (self.ms or 1.0)
        return dict(found)

    @property
    def parts(self) -> dict[str, float]:
        """Milliseconds of each part; their sum is the whole."""
        found: dict[str, float] = defaultdict(float)
        for term, count in self.terms.items():
            found[term.part] += count * term.us / 1e3
        return dict(found)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know, each once."""
        told = (warning for term in self.terms for warning in term.warnings)
        return tuple(dict.fromkeys(told))

    @classmethod
    def sum(cls, parts: Sequence[tuple["Estimate", float]]) -> "Estimate":
        """Add estimates, each so many times."""
        terms: dict[Term, float] = defaultdict(float)
        for estimate, times in parts:
            for term, count in estimate.terms.items():
                terms[term] += times * count
        return cls(dict(terms))


@dataclass(frozen=True, slots=True)
class Ratio:
    """One time over another.

    Attributes:
        value: The ratio; below 1 the first is faster.
        low: Lower end of the interval that holds it in 80 of 100 cases.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def tied(self) -> bool:
        """True if it cannot be told which one is faster."""
        return self.low <= 1 <= self.high


def compare(one: Estimate, other: Estimate) -> Ratio:
    """Divide one time by another, with the interval of the ratio."""
    if not other.ms:
        return Ratio(1.0, 1.0, 1.0) if not one.ms else Ratio(inf, inf, inf)
    if not one.ms:
        return Ratio(0.0, 0.0, 0.0)
    value, sigma = one.ms / other.ms, _sigma([(one, 1.0), (other, -1.0)])
    return Ratio(value, value * exp(-Z_80 * sigma), value * exp(Z_80 * sigma))


def credited(changed: Estimate, dense: Estimate) -> float:
    """Give the milliseconds that a change is credited with: never more than is sure.

    That is the slow end of the ratio's interval where the change is surely faster, the
    dense time where that cannot be told, and what is predicted where it is slower.
    """
    ratio = compare(changed, dense)
    if ratio.high < 1:
        return dense.ms * ratio.high
    return dense.ms if ratio.tied else changed.ms


def log_error(found: float, true: float) -> float:
    """Give the error of a time as a logarithm; 0.1 is about 10 % too slow."""
    return log(found / true)


def _sigma(sides: Sequence[tuple[Estimate, float]]) -> float:
    """Give the deviation of the log of a product of estimates to the power of +-1.

    To first order: each operation weighs as much as its share of its estimate's time,
    and an operation that is on both sides weighs the difference.
    """
    own: dict[tuple[str, tuple[int, ...], float], float] = defaultdict(float)
    shared: dict[tuple[str, float], float] = defaultdict(float)
    for term, weight in _weights(sides):
        own[term.kernel, term.shape, term.own] += weight
        shared[term.kernel, term.shared] += weight
    variance = sum((weight * sigma) ** 2 for (*_, sigma), weight in own.items())
    variance += sum((w * sigma) ** 2 for (_, sigma), w in shared.items())
    return float(variance**0.5)


def _weights(
    sides: Sequence[tuple[Estimate, float]],
) -> Iterator[tuple[Term, float]]:
    for estimate, sign in sides:
        whole = estimate.ms * 1e3
        for term, count in estimate.terms.items():
            yield term, sign * count * term.us / whole if whole else 0.0
