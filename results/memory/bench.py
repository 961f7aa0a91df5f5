"""Peak memory of a calibration pass over random Llamas, by width and by depth.

    python results/memory/bench.py [CELL ...]

SparseGPT prunes every layer of a random model in bfloat16 on 8 x 128 tokens, on inputs
that the pruned blocks leave and on dense ones, in a fresh process each, to one level or
to nine at once. The limit, meant for one level, is the bytes of four blocks and of one
block's Hessians. Each cell is one file in
``cells/``; a cell that is there is not measured again. Writes ``table.csv``. Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
CELLS = HERE / "cells"

FEW_MAPPED = "1048576"
"""glibc raises the size from which it maps memory of its own to 32 MB, and keeps what
is smaller until it is told to trim. At this fixed size it gives all large tensors back
at once, as other C libraries do."""


@dataclass(frozen=True)
class Cell:
    """One model and one way to take its inputs.

    Attributes:
        width: Hidden size; MLPs are 2.75 times as wide.
        depth: Blocks.
        propagate: Whether a block sees what the pruned blocks before it leave.
        give_back: Whether the allocator gives back what is free; see ``FEW_MAPPED``.
        levels: Sparsities that each layer is pruned to in the same pass.
    """

    width: int
    depth: int
    propagate: bool
    give_back: bool
    levels: int = 1

    @property
    def name(self) -> str:
        """Say what it is."""
        inputs = "propagated" if self.propagate else "dense"
        allocator = "" if self.give_back else "-glibc"
        levels = f"-{self.levels}-levels" if self.levels > 1 else ""
        return f"{self.width}x{self.depth}-{inputs}{levels}{allocator}"

    def measure(self) -> dict[str, Any]:
        """Make the model in a temporary folder and measure it in a fresh process."""
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder))
            command = [sys.executable, str(HERE / "pass_memory.py"), folder]
            command += ["--propagate"] if self.propagate else []
            command += ["--levels", str(self.levels)]
            few = {"MALLOC_MMAP_THRESHOLD_": FEW_MAPPED} if self.give_back else {}
            done = subprocess.run(
                command, env=os.environ | few, stdout=subprocess.PIPE, check=True
            )
        found: dict[str, Any] = json.loads(done.stdout)
        limit = 4 * found["block_bytes"] + found["hessian_bytes"]
        return {
            **found,
            "limit_bytes": limit,
            "of_limit": round(found["peak_anon_bytes"] / limit, 3),
        }

    def _save(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.depth,
            num_attention_heads=self.width // 64,
            num_key_value_heads=4,
            max_position_embeddings=128,
        )
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)


def cells() -> list[Cell]:
    """List every cell, cheap ones first: some sixteen minutes of CPU time."""
    sizes = [(512, 6), (512, 24), (1024, 12)]
    sizes += [(2048, depth) for depth in (4, 8, 12, 16)]
    return [
        *(Cell(*size, propagate=True, give_back=True) for size in sizes),
        Cell(2048, 4, propagate=False, give_back=True),
        Cell(2048, 1, propagate=True, give_back=False),
        Cell(2048, 1, propagate=True, give_back=False, levels=9),
        Cell(2048, 12, propagate=True, give_back=False),
    ]


def main() -> None:
    """Measure the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only these; * matches anything")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    CELLS.mkdir(exist_ok=True)
    for cell in cells():
        path = CELLS / f"{cell.name}.json"
        wanted = arguments.cells or ["*"]
        asked = any(fnmatchcase(cell.name, pattern) for pattern in wanted)
        if path.exists() or not asked:
            continue
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {cell.name}\n")
        row = {"cell": cell.name, **vars(cell), **cell.measure()}
        row |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        path.write_text(json.dumps(row, indent=1) + "\n")
    rows = [
        {"levels": 1, **json.loads(path.read_text())} for path in CELLS.glob("*.json")
    ]
    if rows:
        table = pd.DataFrame(rows).sort_values(["width", "depth", "cell"])
        table.to_csv(HERE / "table.csv", index=False)
        sys.stdout.write(table.to_string(index=False) + "\n")


if __name__ == "__main__":
    main()
