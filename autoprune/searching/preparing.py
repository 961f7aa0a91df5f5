"""The making of variants, shared out among a crew."""

import logging
from collections.abc import Callable

from autoprune.compression.shares import Share
from autoprune.errors import RunError
from autoprune.searching.crew import Crew, MakeVariants

log = logging.getLogger(__name__)

DEATHS = 3
"""Workers that one share may cost."""


def make_together(crew: Crew, progress: Callable[[], None]) -> int:
    """Have a crew make the variants of its part of the run, each a share of the blocks.

    Args:
        crew: Whose workers share a store.
        progress: Called from time to time.

    Returns:
        How many were made.

    Raises:
        RunError: If a share costs workers again and again.
        Exception: What a worker raised.
    """
    shares = [Share(index, crew.size) for index in range(crew.size)]
    busy: dict[int, Share] = {}
    deaths: dict[Share, int] = {}
    made = 0
    while shares or busy:
        for worker in crew.idle():
            if shares:
                busy[worker] = shares.pop(0)
                crew.submit(worker, MakeVariants(busy[worker]))
        for outcome in crew.wait(1.0):
            share = busy.pop(outcome.worker)
            if outcome.error is not None:
                raise outcome.error
            made += outcome.result or 0
            if outcome.lost:
                deaths[share] = deaths.get(share, 0) + 1
                log.warning("a worker was lost making variants: %s", outcome.lost)
                if deaths[share] >= DEATHS:
                    raise RunError(
                        f"making variants cost {DEATHS} workers; the last: "
                        f"{outcome.lost}. Take fewer workers, or more memory"
                    )
                shares.insert(0, share)
        progress()
    return made
