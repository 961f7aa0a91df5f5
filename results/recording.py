"""Cells: one result file each, so that a long benchmark resumes where it stopped.

What benchmarks share; each is a folder of scripts, and puts this one on its path.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Cell = Callable[[], Row]
"""What measures a cell."""


class Records:
    """The cells of a benchmark that were measured: files ``NAME.json``.

    Args:
        folder: Where they lie; made with the first one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lacks(self, name: str, wanted: Sequence[str] = ()) -> bool:
        """Tell whether a cell is still to be measured: it is not there, or failed.

        Args:
            name: Its name.
            wanted: Patterns of the names that are asked for; all if empty.
        """
        if wanted and not any(fnmatchcase(name, pattern) for pattern in wanted):
            return False
        path = self.folder / f"{name}.json"
        return not path.exists() or "error" in json.loads(path.read_text())

    def read(self, pattern: str = "*") -> dict[str, Row]:
        """Read the cells that are there, by name; failed ones have an ``error``."""
        return {
            path.stem: json.loads(path.read_text())
            for path in sorted(self.folder.glob("*.json"))
            if fnmatchcase(path.stem, pattern)
        }

    def write(self, name: str, row: Mapping[str, Any], **stamps: str) -> None:
        """Write a cell, whole or not at all.

        Args:
            name: Its name.
            row: What was measured.
            stamps: What else tells how, beside the date and the version of torch.
        """
        day = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        text = json.dumps({"cell": name, **row, **day, **stamps}, indent=1)
        self.folder.mkdir(exist_ok=True)
        part = self.folder / f"{name}.part"
        part.write_text(text + "\n")
        os.replace(part, self.folder / f"{name}.json")


def tell(text: str) -> None:
    """Tell how far a benchmark is, with the time of day."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
