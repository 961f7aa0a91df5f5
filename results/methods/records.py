"""Cells: one result file each; a cell that failed says why and is measured again."""

import ctypes
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

CELLS = Path(__file__).parent / "cells"

Cell = Callable[[], dict[str, Any]]


def run_cells(cells: Mapping[str, Cell]) -> None:
    """Measure cells in their order, each in a process of its own, and record them.

    A child is a copy of this process with all that is loaded, so what it takes beside
    is the cell's alone, and nothing that a cell leaves behind reaches the next.
    """
    CELLS.mkdir(exist_ok=True)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # free memory would hide what cells take
    for name, measure in cells.items():
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {name}\n")
        row = {"cell": name, **_apart(measure)}
        if "error" in row:
            sys.stderr.write(f"         failed: {row['error']}\n")
        row |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        part = CELLS / f"{name}.part"
        part.write_text(json.dumps(row, indent=1) + "\n")
        os.replace(part, CELLS / f"{name}.json")


def read_cells() -> dict[str, dict[str, Any]]:
    """Read the cells that were tried, by name; failed ones have an ``error``."""
    return {
        path.stem: json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))
    }


def is_measured(name: str) -> bool:
    """Tell whether a cell is there and did not fail."""
    path = CELLS / f"{name}.json"
    return path.exists() and "error" not in json.loads(path.read_text())


def _apart(measure: Cell) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(measure, theirs))
    child.start()
    theirs.close()
    try:
        row: dict[str, Any] = ours.recv()
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
