"""Whether a worker elsewhere sees the store in which its driver has the variants."""

import platform
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from autoprune.errors import RunError, StoreError

_SUFFIX = ".mark"

_ABANDONED_S = 24 * 3600.0
"""Age of a mark whose run is gone: one that is needed is put anew each time."""


@dataclass(frozen=True)
class StoreMark:
    """An empty file in a run's store: who finds it there sees the same store.

    Its name is new in every run, so that a copy of the store does not pass for it. It
    lies beside the variants' folders, where it neither counts nor is evicted.

    Attributes:
        folder: The store, as the driver names it.
        name: Of the file.
    """

    folder: str
    name: str

    @classmethod
    def make(cls, folder: Path) -> Self:
        """Choose a mark, and remove those that killed runs have left."""
        for path in folder.glob(f"*{_SUFFIX}"):
            with suppress(OSError):  # another run removes it, too
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()
        return cls(str(folder), uuid.uuid4().hex + _SUFFIX)

    def put(self) -> None:
        """Put the file where it belongs, also where the store was deleted meanwhile.

        Raises:
            StoreError: If it cannot be written.
        """
        path = Path(self.folder) / self.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise StoreError(
                f"cannot mark the store {self.folder} for its workers: "
                f"{error.strerror}. Set AUTOPRUNE_CACHE to a folder that can be written"
            ) from error

    def remove(self) -> None:
        """Remove the file. Twice does no harm."""
        with suppress(OSError):  # it goes with the store, or by its age
            (Path(self.folder) / self.name).unlink(missing_ok=True)

    def check(self, folder: Path) -> None:
        """Refuse a worker's store that is not the run's.

        Raises:
            RunError: If the file is not there.
        """
        if not (folder / self.name).exists():
            raise RunError(
                f"the worker on {platform.node()} does not see the run's store "
                f"{self.folder}, its own is {folder}: it would wait for variants that "
                "others make. Set AUTOPRUNE_CACHE to a folder that all nodes share, "
                "here and on every node before ray start, and start again"
            )
