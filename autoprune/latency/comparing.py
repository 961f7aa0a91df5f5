"""Compares whole candidates on one noisy thread: in turns, with the first one twice.

Candidates run round-robin, in another order every round; ratios are taken within a
round, so that load that comes and goes meets all alike. The baseline against itself
(A/A) tells how far that worked.
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, thread_time

from autoprune.latency.timing import Call, Timing, count_of, one_thread

NOISE = 0.05
"""Error of A/A above which a comparison is called noisy."""

AGAIN = "(again)"
"""Name of the baseline's double."""

DRAWS = 1000
"""Resamples of a bootstrap."""


@dataclass(frozen=True, slots=True)
class Against:
    """A candidate against the baseline.

    Attributes:
        timing: Its own microseconds.
        ratio: Its time over the baseline's: the median over rounds.
        low: Lower end of the interval that holds 95 % of resampled medians.
        high: Upper end.
    """

    timing: Timing
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of a comparison.

    Attributes:
        found: By name, the baseline too.
        a_a: The baseline's double over the baseline.
        rounds: Rounds that were run.
    """

    found: Mapping[str, Against]
    a_a: float
    rounds: int

    @property
    def noisy(self) -> bool:
        """True if even the same looks different: do not rely on small differences."""
        return abs(self.a_a - 1) > NOISE


def compare(
    candidates: Mapping[str, Call],
    *,
    double: Call,
    rounds: int = 7,
    batch_ms: float = 50.0,
    seconds: float = 60.0,
    seed: int = 0,
) -> Comparison:
    """Time several candidates against the first.

    Where A/A is off after the rounds, as many more are run, if time allows.

    Args:
        candidates: By name; the first is the baseline.
        double: The baseline once more, built separately, with weights of its own.
        rounds: Rounds, the warm-up not counted; at least 3 are run.
        batch_ms: A candidate's turn takes at least as long.
        seconds: Stop after the round in which these are over.
        seed: Of the order in rounds, and of the resampling.
    """
    end = perf_counter() + seconds
    chance = random.Random(seed)
    calls = dict(candidates) | {AGAIN: double}
    times: dict[str, list[float]] = {name: [] for name in calls}
    with one_thread():
        counts = {name: _count(call, batch_ms) for name, call in calls.items()}
        wanted = max(rounds, 3)
        while len(times[AGAIN]) < wanted:
            for name in chance.sample(list(calls), len(calls)):
                times[name].append(_turn(calls[name], counts[name]))
            done = len(times[AGAIN])
            if done >= 3 and perf_counter() > end:
                break
            if done == rounds == wanted and _off(times, next(iter(candidates))):
                wanted = 2 * rounds
    return _summed(times, next(iter(candidates)), chance)


def _off(times: Mapping[str, Sequence[float]], base: str) -> bool:
    return abs(_median_ratio(times[AGAIN], times[base]) - 1) > NOISE


def _summed(
    times: Mapping[str, Sequence[float]], base: str, chance: random.Random
) -> Comparison:
    found = {}
    for name, own in times.items():
        if name == AGAIN:
            continue
        ratios = [a / b for a, b in zip(own, times[base], strict=True)]
        low, high = bootstrap_median(ratios, chance)
        median = statistics.median(ratios)
        found[name] = Against(Timing.of(own, "thread"), median, low, high)
    a_a = _median_ratio(times[AGAIN], times[base])
    return Comparison(found, a_a, len(times[base]))


def bootstrap_median(
    values: Sequence[float], chance: random.Random
) -> tuple[float, float]:
    """Give the interval that holds 95 % of the medians of resampled values."""
    medians = sorted(
        statistics.median(chance.choices(values, k=len(values))) for _ in range(DRAWS)
    )
    return medians[round(0.025 * (DRAWS - 1))], medians[round(0.975 * (DRAWS - 1))]


def _median_ratio(own: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def _count(call: Call, batch_ms: float) -> int:
    """Warm up, and say how many calls make a turn."""
    _turn(call, 1)
    return count_of(_turn(call, 1), batch_ms * 1e3)


def _turn(call: Call, count: int) -> float:
    start = thread_time()
    for _ in range(count):
        call()
    return (thread_time() - start) * 1e6 / count
