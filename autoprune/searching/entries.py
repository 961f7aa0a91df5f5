"""Numbers by key, in a file that several processes may add to."""

import logging
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from jaxtyping import Float

from autoprune.errors import StoreError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entries:
    """As many numbers for each key, in a file that is whole or absent."""

    path: Path

    def read(self) -> dict[str, Float[np.ndarray, " numbers"]]:
        """Read all entries; none if the file is absent or damaged."""
        try:
            with self.path.open("rb") as file, np.load(file) as found:
                pairs = zip(found["keys"].tolist(), found["values"], strict=True)
                return dict(pairs)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged (%s): measuring again", self.path, error)
            return {}

    def add(self, new: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " numbers"]]:
        """Add entries to those that are there by now; return them all.

        Raises:
            StoreError: If the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock")):
                entries = self.read() | {k: np.atleast_1d(v) for k, v in new.items()}
                self._write(entries)
        except OSError as error:
            raise StoreError(
                f"cannot write sensitivities to {self.path}: {error.strerror}. Set "
                "AUTOPRUNE_CACHE to a folder that can be written"
            ) from error
        return entries

    def _write(self, entries: Mapping[str, Float[np.ndarray, " numbers"]]) -> None:
        handle, name = tempfile.mkstemp(suffix=".part", dir=self.path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, keys=list(entries), values=np.stack([*entries.values()]))
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
