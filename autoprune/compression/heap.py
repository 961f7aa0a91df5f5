"""The heap of the C library: memory that is free is given back to the system.

glibc maps large tensors one by one and unmaps them when they are freed, but learns
from every such free: up to 32 MB, it then takes tensors of that size from its heap and
keeps them there. What a block leaves behind would count beside what the next one needs.
"""

import ctypes
from collections.abc import Callable
from functools import cache

WORTH_BYTES = 2**24
"""Work on less than this, one Hessian of 2048 inputs, leaves too little behind."""


@cache
def _trimmer() -> Callable[[int], int] | None:
    """Find ``malloc_trim``, which glibc alone has."""
    # musl, macOS and Windows return large tensors without being asked, or have no call
    # for it. Nothing is missing there, so nothing is said.
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no such function; no such library
        return None
    return trim


def give_back_free_memory(after: int | None = None) -> bool:
    """Return free pages of the heap to the system, wherever in the heap they are.

    Nothing of the process is changed but its size. A threshold set by ``mallopt`` would
    stay for good, and every tensor above it cost page faults: with 1 MB a forward pass
    of a model of 135 million weights takes a third more CPU time (measured).

    Args:
        after: Bytes of the weights or sums that were worked on. If they are few
            nothing is done: pages that are soon taken again cost time, 13 % of a pass
            over narrow blocks (measured). None to do it whatever they are.

    Returns:
        Whether it was done: only glibc can.
    """
    if after is not None and after < WORTH_BYTES:
        return False
    trim = _trimmer()
    if trim is None:
        return False
    trim(0)
    return True
