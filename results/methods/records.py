"""Cells, each in a process of its own; one that failed says why, and is tried again."""

import ctypes
import multiprocessing
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from recording import Cell, Records, Row, tell  # noqa: E402

RECORDS = Records(Path(__file__).parent / "cells")


def run_cells(cells: Mapping[str, Cell]) -> None:
    """Measure cells in their order, each in a process of its own, and record them.

    A child is a copy of this process with all that is loaded, so what it takes beside
    is the cell's alone, and nothing that a cell leaves behind reaches the next.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # free memory would hide what cells take
    for name, measure in cells.items():
        tell(name)
        row = _apart(measure)
        if "error" in row:
            tell(f"failed: {row['error']}")
        RECORDS.write(name, row)


def _apart(measure: Cell) -> Row:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(measure, theirs))
    child.start()
    theirs.close()
    try:
        row: Row = ours.recv()
    except EOFError:
        child.join()
        row = {"error": f"the process ended with exit code {child.exitcode}"}
    child.join()
    return row


def _answer(measure: Cell, answer: Connection) -> None:
    began = time.process_time()
    try:
        row = measure()
    except Exception as error:  # whatever a method does: the other cells go on
        row = {"error": f"{type(error).__name__}: {error}"}
    row["cell_cpu_s"] = round(time.process_time() - began, 1)
    answer.send(row)
