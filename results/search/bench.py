"""AutoPrune's search beside EvoPress, allocation, heuristics and random search.

    python results/search/bench.py [CELL ...]

On SmolLM2-135M, one thread, CPU time. Each cell is one file in ``cells/``; a cell that
is there is not measured again, so the run resumes and may be done in pieces (names may
be patterns: ``'ours-*'``). At the end ``table.csv`` and ``search.png`` are written from
the cells that are there.
"""

import argparse
import sys

import ablations
import bits
import overhead
import race
import spearman
from cells import run_cells
from shown import show


def main() -> None:
    """Measure the cells that are missing, then show all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only these; * matches anything")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if not arguments.show:
        for topic in (race, overhead, spearman, bits, ablations):
            run_cells(topic.cells(), arguments.cells)
    sys.stdout.write(show())


if __name__ == "__main__":
    main()
