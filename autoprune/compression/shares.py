"""Sharing the making of variants out among processes, block by block."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from autoprune.errors import StoreError

T = TypeVar("T")

PATIENCE_S = 4 * 3600.0
"""Most time that a process waits for what another one makes."""


@dataclass(frozen=True)
class Share:
    """The blocks that a process makes variants of; others make the rest.

    Attributes:
        index: Of this share.
        of: How many shares there are.
    """

    index: int = 0
    of: int = 1

    @property
    def alone(self) -> bool:
        """True if nobody else makes anything."""
        return self.of == 1

    def has(self, block: int | None) -> bool:
        """Tell whether a block is in this share; what is in no block is in the first.

        Example:
            >>> [Share(1, 3).has(block) for block in (None, 0, 1, 2, 3, 4)]
            [False, False, True, False, False, True]
        """
        return (block or 0) % self.of == self.index


ALL = Share()
"""All blocks: of a process that makes variants by itself."""


def awaited(read: Callable[[], T | None], what: str) -> T:
    """Wait for something that another process makes.

    Args:
        read: Gives it once it is there, None before.
        what: Its name.

    Raises:
        StoreError: If it does not come.
    """
    began, pause = time.monotonic(), 0.01
    while (found := read()) is None:
        if time.monotonic() - began > PATIENCE_S:
            raise StoreError(
                f"{what} is made by another process, and has not come in "
                f"{PATIENCE_S / 3600:.0f} hours. Start again with fewer workers"
            )
        time.sleep(pause)
        pause = min(1.2 * pause, 0.5)
    return found
