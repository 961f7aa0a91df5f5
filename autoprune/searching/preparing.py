"""What comes before the trials, shared out among a crew: variants, and their costs."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from autoprune.compression.shares import Share
from autoprune.errors import RunError
from autoprune.searching.costings import Costing, Costs
from autoprune.searching.crew import Crew, Job, MakeVariants, MeasureCosts

log = logging.getLogger(__name__)

DEATHS = 3
"""Workers that one share may cost."""

GATHER_S = 10.0
"""Time that others have to come, once a worker is ready, before blocks are shared."""

STALL_S = 300.0
"""Time that a share of the blocks may lie while no worker is there for it."""


class _StalledError(Exception):
    """Nobody comes for a job that others may be waiting for."""


def make_together(crew: Crew, progress: Callable[[], None]) -> int:
    """Have a crew make the variants of its part of the run, each a share of the blocks.

    Workers wait for what others make. So there are no more shares than workers, and
    where one is lost and none takes its place, the rest is shared out anew.

    Args:
        crew: Whose workers share a store.
        progress: Called from time to time.

    Returns:
        How many were made.

    Raises:
        RunError: If a share costs workers again and again.
        Exception: What a worker raised.
    """
    made, what = 0, "making variants"
    while True:
        jobs = [MakeVariants(share) for share in _shares(crew, progress)]
        try:
            for _, count in _shared_out(crew, jobs, what, progress, stall_s=STALL_S):
                made += count
        except _StalledError:
            log.warning("%s with fewer workers: nobody took one's place", what)
            crew.recall()
        else:
            return made


def measure_together(
    crew: Crew, costing: Costing, progress: Callable[[], None] = lambda: None
) -> Iterator[Costs]:
    """Have a crew measure what choices cost, each worker a share.

    Args:
        crew: Who measures; its variants are made.
        costing: What.
        progress: Called from time to time.

    Yields:
        What is found, as it comes.

    Raises:
        RunError: If a share costs workers again and again.
        Exception: What a worker raised.
    """
    jobs = [MeasureCosts(share) for share in costing.shares(crew.size)]
    found = _shared_out(crew, jobs, "measuring sensitivities", progress)
    yield from costing.joined(found)


def _shares(crew: Crew, progress: Callable[[], None]) -> list[Share]:
    """Cut a share for every worker that is there, once those that come are."""
    since: float | None = None
    while len(idle := crew.idle()) < crew.size:
        if not idle or crew.loading:
            since = None
        elif since is None:
            since = time.monotonic()
        elif time.monotonic() - since > GATHER_S:
            break
        crew.wait(1.0)
        progress()
    return [Share(index, len(idle)) for index in range(len(idle))]


def _shared_out(
    crew: Crew,
    jobs: Sequence[Job],
    what: str,
    progress: Callable[[], None],
    *,
    stall_s: float = math.inf,
) -> Iterator[tuple[int, Any]]:
    """Have jobs done by whoever is idle; give each one's place and result."""
    left, taken = list(range(len(jobs))), time.monotonic()
    busy: dict[int, int] = {}
    deaths = [0] * len(jobs)
    while left or busy:
        for worker in crew.idle():
            if left:
                busy[worker] = left.pop(0)
                crew.submit(worker, jobs[busy[worker]])
        if not (left and busy) or crew.loading:
            taken = time.monotonic()
        elif time.monotonic() - taken > stall_s:
            raise _StalledError
        for outcome in crew.wait(1.0):
            place = busy.pop(outcome.worker)
            if outcome.error is not None:
                raise outcome.error
            if not outcome.lost:
                yield place, outcome.result
                continue
            deaths[place] += 1
            log.warning("a worker was lost %s: %s", what, outcome.lost)
            if deaths[place] >= DEATHS:
                raise RunError(
                    f"{what} cost {DEATHS} workers; the last: {outcome.lost}. Take "
                    "fewer workers, or more memory"
                )
            left.insert(0, place)
        progress()
