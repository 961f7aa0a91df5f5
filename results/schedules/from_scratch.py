"""When to prune small models that are trained from scratch: before, during or after.

    python results/schedules/from_scratch.py [CELL ...]

A Llama of two blocks (82,000 weights to prune) that foretells bytes of the built-in
text, and a ResNet of three blocks (77,000) on the digits of scikit-learn. Every arm
takes the same number of steps, ten seeds each; arms of a seed begin with the same
weights and see the same batches. One thread, CPU time. Each cell, an arm at a sparsity,
is one file in ``cells/``; a cell that is there is not measured again, so the run
resumes and may be done in pieces (names may be patterns: ``'resnet-95-*'``). At the end
``from_scratch.csv`` and ``from_scratch.png`` are written from the cells there are.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from arms import Arm, cells  # noqa: E402
from from_scratch_shown import show  # noqa: E402
from recording import Records, Row, tell  # noqa: E402

RECORDS = Records(Path(__file__).parent / "cells")
SEEDS = 10


def main() -> None:
    """Measure the cells that are missing, then show all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only these; * matches anything")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--list", action="store_true", help="list what is to be done")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    todo = {n: c for n, c in cells().items() if RECORDS.lacks(n, arguments.cells)}
    if arguments.list:
        sys.stdout.write("\n".join([*todo, ""]))
        return
    for name, (scene, sparsity, arm) in () if arguments.show else todo.items():
        tell(name)
        RECORDS.write(name, measured(scene, sparsity, arm))
    sys.stdout.write(show(RECORDS.read()))


def measured(scene: str, sparsity: float, arm: Arm) -> Row:
    """Train with every seed; lists have one number a seed."""
    began = time.process_time()
    results = [arm(scene, seed, sparsity) for seed in range(SEEDS)]
    lists = {
        key: [round(result[key], 5) for result in results] for key in sorted(results[0])
    }
    spent = round(time.process_time() - began, 1)
    return {"scene": scene, "sparsity": sparsity, **lists, "cell_cpu_s": spent}


if __name__ == "__main__":
    main()
