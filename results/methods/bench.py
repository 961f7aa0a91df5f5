"""Every method on SmolLM2-135M, on the same tokens: quality, bytes, time and memory.

    python results/methods/bench.py [CELL ...]

32 x 256 tokens of WikiText-2 for statistics, 24 x 256 tokens of other articles to
judge by, one thread, CPU time. Every policy is made block by block on the inputs that
its own blocks before leave. Each cell is one file in ``cells/``; a cell that is there
is not measured again, so the run resumes and may be done in pieces (names may be
patterns: ``'gptq-*'``). A cell that fails says so in its file, and is tried again next
time. At the end ``table.csv`` and ``methods.png`` are written from the cells there are,
and the orders that the literature leads one to expect are checked.
"""

import argparse
import sys
from functools import partial

import measured
import torch
from records import RECORDS, Cell, run_cells
from settings import Setting, covered, cpu_seconds
from shown import show

from autoprune.plugins import Plugins, load_plugins


def main() -> None:
    """Measure the cells that are missing, cheap ones first, then show all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only these; * matches anything")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--list", action="store_true", help="list what is to be done")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plugins = load_plugins()
    todo = [] if arguments.show else missing(plugins, arguments.cells)
    if arguments.list:
        sys.stdout.write(listed(plugins, todo))
        return
    if todo:
        bench = measured.open_bench(plugins)
        cells: dict[str, Cell] = {
            one.name: partial(measured.measure, bench, one) for one in todo
        }
        run_cells(cells)
    sys.stdout.write(show())


def missing(plugins: Plugins, wanted: list[str]) -> list[Setting]:
    """List the cells that were asked for and are not there; all if none is named."""
    every = [measured.DENSE_CELL, *covered(plugins.objects["methods"])]
    return [one for one in every if RECORDS.lacks(one.name, wanted)]


def listed(plugins: Plugins, todo: list[Setting]) -> str:
    """Write down cells with the CPU seconds that they should take."""
    methods = plugins.objects["methods"]
    seconds = [cpu_seconds(one, methods) for one in todo]
    lines = [f"{s:6.0f}  {one.name}" for s, one in zip(seconds, todo, strict=True)]
    total = f"{len(todo)} cells, about {sum(seconds) / 60:.0f} CPU minutes"
    return "\n".join([*lines, total, ""])


if __name__ == "__main__":
    main()
