"""How good a recording is by its own measure: spread, drift, and what is missing."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any

from autoprune.latency.journal import key_of
from autoprune.latency.profiles import Point


def quality_of(points: Sequence[Point], repeats: Mapping[str, float]) -> dict[str, Any]:
    """Judge a recording.

    Args:
        points: All points.
        repeats: By a point's key, the microseconds it took at the end once more.

    Returns:
        ``spread_p50`` and ``spread_p95``: how far nine of ten timings of a point lie
        above its median. ``repeat_p50`` and ``repeat_p95``: how much a point changed by
        the end, up or down. ``drift``: by how much all changed together.
    """
    timed = [point for point in points if point.ok]
    spreads = [point.spread for point in timed]
    by_key = {key_of(point): point for point in timed}
    changes = [log(us / by_key[key].us) for key, us in repeats.items() if key in by_key]
    reasons = Counter(
        f"{point.kernel}: {point.status}" for point in points if not point.ok
    )
    return {
        "timed": len(timed),
        "failed": dict(sorted(reasons.items())),
        "spread_p50": _quantile(spreads, 0.5),
        "spread_p95": _quantile(spreads, 0.95),
        "repeated": len(changes),
        "repeat_p50": _quantile([abs(change) for change in changes], 0.5),
        "repeat_p95": _quantile([abs(change) for change in changes], 0.95),
        "drift": exp(statistics.median(changes)) - 1 if changes else None,
    }


def _quantile(values: Sequence[float], share: float) -> float | None:
    """Give a quantile; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
