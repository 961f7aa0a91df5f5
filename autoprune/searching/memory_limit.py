"""The memory that a run may take: refused beforehand, or held by the system."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from autoprune.errors import ConfigError


def share_of(limit: float, workers: int) -> int:
    """Share memory out among workers and the process that drives them, in bytes.

    Raises:
        ConfigError: If workers need more; this process, with model and text loaded,
            tells how much each will need.
    """
    each = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most = int(limit // each) - 1
    if workers > max(most, 0):
        can = f"at most {most} fit" if most > 0 else "none fits"
        raise ConfigError(
            f"{workers} workers and this process take about {each / 1e9:.2f} GB each, "
            f"and the memory budget is {limit / 1e9:.2f} GB: {can} beside this "
            "process. Take fewer workers, or allow more memory"
        )
    return int(limit // (workers + 1))


def hold_memory(most: int) -> None:
    """Let no more than so many bytes of data be allocated by this process.

    What asks for more fails, and is recorded, where the kernel would end the process.
    Files that are mapped to be read do not count.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def held_memory(most: float | None) -> Iterator[None]:
    """Hold this process to so many bytes for a while; None for no limit."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if most is not None:
        hold_memory(int(most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
