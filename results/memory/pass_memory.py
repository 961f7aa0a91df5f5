"""Measures what memory one calibration pass takes; run in a fresh process.

    python results/memory/pass_memory.py FOLDER [--propagate] [--levels N]

FOLDER holds a random Llama. Every layer of its blocks is pruned to 50 % by SparseGPT
on a few tokens, and to more levels around it if asked. Prints one line of JSON. What
the process takes before it loads the model (the interpreter, torch, transformers) does
not count.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peak import PeakMemory
from transformers import LlamaForCausalLM

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.store import VariantStore
from autoprune.models.checkpoints import load_model, resolve
from autoprune.models.layers import Inventory, inventory
from autoprune.models.text import TokenWindows
from autoprune.plugins import load_plugins
from autoprune.policy import Action

WINDOWS, LENGTH = 8, 128
STEP = 0.06
LOADED = LlamaForCausalLM
"""Named here so that its code is in memory before anything is counted."""


def measure(folder: Path, *, propagate: bool, levels: int = 1) -> dict[str, Any]:
    """Make the variants of every layer, and tell what memory that took.

    Args:
        folder: A plain Hugging Face folder.
        propagate: Give each block the inputs that the pruned blocks before it leave.
        levels: How many variants of each layer, steps of ``STEP`` apart around 50 %.
    """
    plugins = load_plugins()
    middle, *others = (_pruned(0.5 + STEP * at) for at in _around(levels))
    with tempfile.TemporaryDirectory() as scratch, PeakMemory() as peak:
        checkpoint = resolve(str(folder), cache=Path(scratch))
        model = load_model(checkpoint)
        assert isinstance(model, LOADED)
        found = inventory(model, list(plugins.objects["architectures"].values()))
        layers = [layer for layer in found.layers if layer.block is not None]
        reference = dict.fromkeys(layers, middle)
        wanted = [(layer, one) for layer in layers for one in (middle, *others)]
        bank = VariantBank(
            StitchedModel(model, found.layers, compute_dtype=model.dtype),
            found,
            Actions(plugins.objects["methods"]),
            VariantStore(Path(scratch) / "variants", 10**11),
            _tokens(model.config.vocab_size),
            checkpoint.revision,
            reference if propagate else {},
        )
        began = time.process_time()
        made = bank.make(wanted)
        spent = time.process_time() - began
    return {
        "variants": made,
        "cpu_s": round(spent, 1),
        **sizes(found, model.dtype),
        "peak_anon_bytes": peak.anon_bytes,
        "peak_resident_bytes": peak.resident_bytes,
    }


def sizes(found: Inventory, dtype: torch.dtype) -> dict[str, int]:
    """Tell the bytes of a block's weights and of its Hessians, one an input."""
    layers = [layer for layer in found.layers if layer.block == 0]
    widths = {layer.input: layer.shape[1] for layer in layers}
    return {
        "block_bytes": sum(layer.numel for layer in layers) * dtype.itemsize,
        "hessian_bytes": sum(4 * width**2 for width in widths.values()),
    }


def _around(levels: int) -> list[int]:
    """Give whole numbers around zero, the nearest first: 0, 1, -1, 2, -2."""
    return sorted(range(-((levels - 1) // 2), levels // 2 + 1), key=abs)


def _pruned(sparsity: float) -> Action:
    return Action.parse(f"sparsegpt(sparsity={sparsity:.2f})")


def _tokens(vocabulary: int) -> TokenWindows:
    """Draw windows of tokens at random, always the same."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (WINDOWS, LENGTH), generator=generator)
    return TokenWindows(ids, "statistics", "random", "0" * 16)


def main() -> None:
    """Measure the model in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--propagate", action="store_true")
    parser.add_argument("--levels", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(
        arguments.folder, propagate=arguments.propagate, levels=arguments.levels
    )
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
