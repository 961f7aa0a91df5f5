"""Cells: one result file each, so that a long benchmark resumes where it stopped."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

CELLS = Path(__file__).parent / "cells"

Cell = Callable[[], dict[str, Any]]


def run_cells(cells: Mapping[str, Cell], wanted: list[str]) -> None:
    """Measure the cells that are missing, in their order.

    Args:
        cells: What each name measures.
        wanted: Patterns of names; all if empty.
    """
    torch.set_num_threads(1)
    CELLS.mkdir(exist_ok=True)
    for name, measure in cells.items():
        path = CELLS / f"{name}.json"
        asked = not wanted or any(fnmatchcase(name, pattern) for pattern in wanted)
        if path.exists() or not asked:
            continue
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {name}\n")
        began = time.process_time()
        row = {"cell": name, **measure()}
        row |= {
            "cell_cpu_s": round(time.process_time() - began, 1),
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "machine": f"{_processor()}, 1 thread, CPU time",
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(row, indent=1) + "\n")
        os.replace(part, path)


def read_cells(pattern: str = "*") -> dict[str, dict[str, Any]]:
    """Read the cells that were measured, by name."""
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted(CELLS.glob("*.json"))
        if fnmatchcase(path.stem, pattern)
    }


def _processor() -> str:
    units = torch.cpu.get_capabilities()
    fast = [name for name in ("amx_bf16", "avx512_bf16") if units.get(name)]
    return f"{platform.machine()} {' '.join(fast)}"
