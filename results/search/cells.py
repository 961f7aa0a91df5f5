"""The cells of this benchmark: measured in their order, one file each."""

import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from recording import Cell, Records, tell  # noqa: E402

RECORDS = Records(Path(__file__).parent / "cells")
read_cells = RECORDS.read


def run_cells(cells: Mapping[str, Cell], wanted: list[str]) -> None:
    """Measure the cells that are missing, in their order.

    Args:
        cells: What each name measures.
        wanted: Patterns of names; all if empty.
    """
    torch.set_num_threads(1)
    for name, measure in cells.items():
        if not RECORDS.lacks(name, wanted):
            continue
        tell(name)
        began = time.process_time()
        row = measure()
        row["cell_cpu_s"] = round(time.process_time() - began, 1)
        RECORDS.write(name, row, machine=f"{_processor()}, 1 thread, CPU time")


def _processor() -> str:
    units = torch.cpu.get_capabilities()
    fast = [name for name in ("amx_bf16", "avx512_bf16") if units.get(name)]
    return f"{platform.machine()} {' '.join(fast)}"
