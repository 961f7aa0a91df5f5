"""Block-wise reconstruction of SmolLM2-135M at 2:4: quality before and after.

    python results/schedules/blockwise.py [--epochs 4]

Wanda at 2:4 in all blocks, made on the inputs that its own blocks leave, from 16 x 512
tokens of WikiText-2; on the same windows each block is then trained, by 14 of them, and
kept if it is better on the other two. Judged by 8 x 512 tokens of other articles. One
thread, CPU time. All goes to ``blockwise.json``.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from autoprune.compression.store import VariantStore
from autoprune.config import TextConfig
from autoprune.evaluation.workbench import Workbench
from autoprune.models.layers import read_weight
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Action, Policy
from autoprune.training.blockwise import BlockwiseReconstruction, BlockwiseSettings
from autoprune.training.dense import DenseParameters

ARTICLES = Path(__file__).parents[3] / "shared/data/wikitext-2/valid.articles.jsonl"
"""WikiText-2 where it is at hand; else the text that CPython ships."""

ACTION, HELD_OUT = "wanda(pattern=2:4)", 2
METRICS = ("perplexity", "kl")


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    settings = BlockwiseSettings(epochs=parser.parse_args().epochs)
    torch.set_num_threads(1)
    bench = open_bench()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(bench, settings, VariantStore(Path(folder), 10**11))
    stamps = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    text = json.dumps(row | stamps, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n")


def open_bench() -> Workbench:
    """Load SmolLM2-135M and its text."""
    text = TextConfig(
        source=f"file:{ARTICLES}" if ARTICLES.exists() else "builtin",
        window=512,
        statistics=16,
        fitness=1,
        choice=1,
        report=8,
    )
    return Workbench.open(
        load_plugins(),
        model="demo",
        task="causal-lm",
        text=text,
        target="packed",
        seed=0,
    )


def measure(
    bench: Workbench, settings: BlockwiseSettings, store: VariantStore
) -> dict[str, Any]:
    """Prune, train and judge."""
    action = bench.actions.canonical(Action.parse(ACTION))
    policy = Policy(
        {
            site.name: DENSE if site.layers[0].block is None else action
            for site in bench.inventory.sites
        }
    )
    found: dict[str, Any] = {"dense": bench.dense_metrics("report")}
    bank = bench.bank(policy)
    bank.store = store
    found["one_shot"] = bench.measure(policy, bank, "report", metrics=METRICS).metrics
    pruned, began = zeros(bench), time.process_time()
    training = BlockwiseReconstruction(
        bench.stitched.model,
        bench.inventory,
        DenseParameters.of_stitched(bench.stitched),
        settings,
    )
    reached = training.run(bench.splits["statistics"].ids, held_out=HELD_OUT)
    spent = time.process_time() - began
    assert zeros(bench) == pruned, "a pruned weight has come back"
    # The same actions are on the model, so no variant is put in the place of a weight.
    found["blockwise"] = bench.measure(policy, bank, "report", metrics=METRICS).metrics
    return {
        "action": ACTION,
        "epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "compute_dtype": str(bench.compute_dtype),
        **{cell: {name: found[cell][name] for name in METRICS} for cell in found},
        "train_cpu_s": round(spent, 1),
        "pruned_weights": pruned,
        "blocks": [[round(one.before, 4), round(one.after, 4)] for one in reached],
    }


def zeros(bench: Workbench) -> int:
    """Count the zeros in all blocks."""
    layers = [layer for layer in bench.layers if layer.block is not None]
    model = bench.stitched.model
    return sum(int((read_weight(model, layer) == 0).sum()) for layer in layers)


if __name__ == "__main__":
    main()
