"""What recoveries give back on SmolLM2-135M, at equal tokens, at 2:4 and at 60 %.

    python results/schedules/recovery.py [CELL ...] [--show]

Wanda in all blocks, solved on the inputs that its own blocks leave. Recoveries train on
36 windows of 512 tokens of WikiText-2 and are judged by 16 windows of other articles;
``dense-*`` trains the dense model in the same way, so that what it learns of the text
is not taken for recovery. One thread, CPU time. Each cell is one file in ``cells/``; a
cell that is there is not measured again. ``--show`` writes ``recovery.csv``.

Cells ``moving-*`` are courses in which training also says what is pruned.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from recording import Records, tell  # noqa: E402

from autoprune.compression.store import VariantStore  # noqa: E402
from autoprune.config import TextConfig  # noqa: E402
from autoprune.evaluation.scheduled import course_of, own_bank  # noqa: E402
from autoprune.evaluation.workbench import Workbench  # noqa: E402
from autoprune.plugins import load_plugins  # noqa: E402
from autoprune.policy import DENSE, Action, Policy  # noqa: E402
from autoprune.training.masks import FrozenMasks  # noqa: E402
from autoprune.training.recovery import Pupil  # noqa: E402

ARTICLES = Path(__file__).parents[3] / "shared/data/wikitext-2/valid.articles.jsonl"
"""WikiText-2 where it is at hand; else the text that CPython ships."""

ACTIONS = {"24": "wanda(pattern=2:4)", "60": "wanda(sparsity=0.6)"}
TOKENS, TRAINED, HELD = 16_384, 32, 4
"""Tokens of every recovery, and windows that train and that judge on the way."""

TEXT = "task=1.0, divergence=0.0"
"""Losses of adapters that learn the text's own words."""

RECOVERIES = {
    "none": "",
    "finetune": f" + finetune(tokens={TOKENS}, batch=1, learning_rate=1e-4)",
    "distill": f" + distill(tokens={TOKENS}, batch=1, learning_rate=1e-4)",
    "squarehead": f" + distill(tokens={TOKENS}, batch=1, learning_rate=1e-4, hidden=1)",
    "lora": f" + lora(tokens={TOKENS}, batch=1, learning_rate=1e-3, {TEXT})",
    "loradistill": f" + lora(tokens={TOKENS}, batch=1, learning_rate=1e-3)",
    "blockwise": f" + blockwise(tokens={TOKENS})",
}
ONLY_24 = ("squarehead", "loradistill")

RATE = f"tokens={TOKENS}, batch=1, learning_rate=1e-4, interval=4"
MOVING = {
    "24-srste": f"one-shot + sr-ste({RATE})",
    "24-loraprune": f"during + loraprune(tokens={TOKENS}, batch=1, learning_rate=1e-3)",
    "60-rigl": f"one-shot + rigl({RATE}, fraction=0.1)",
}
METRICS = ("perplexity", "kl")
RECORDS = Records(HERE / "cells")


def main() -> None:
    """Measure the cells that are missing, then show all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only these; * matches anything")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cells = [f"recovery-24-{how}" for how in RECOVERIES]
    cells += [f"recovery-60-{how}" for how in RECOVERIES if how not in ONLY_24]
    cells += ["recovery-dense-none", "recovery-dense-finetune", "recovery-dense-lora"]
    cells += [f"moving-{case}" for case in MOVING]
    wanted = [cell for cell in cells if RECORDS.lacks(cell, asked.cells)]
    if wanted and not asked.show:
        bench = open_bench()
        with tempfile.TemporaryDirectory() as folder:
            bench.store = VariantStore(Path(folder) / "variants", 10**11)
            for cell in wanted:
                tell(cell)
                kind, where, how = cell.split("-")
                if kind == "moving":
                    schedule = MOVING[f"{where}-{how}"]
                else:
                    schedule = f"one-shot{RECOVERIES[how]}"
                found = {"where": where, "how": how, "schedule": schedule}
                RECORDS.write(cell, found | measure(bench, where, schedule))
    print(show())


def open_bench() -> Workbench:
    """Load SmolLM2-135M and its text."""
    return Workbench.open(
        load_plugins(),
        model="demo",
        task="causal-lm",
        text=text_config(),
        target="packed",
        seed=0,
    )


def text_config() -> TextConfig:
    """Say which text, and how much of it."""
    return TextConfig(
        source=f"file:{ARTICLES}" if ARTICLES.exists() else "builtin",
        window=512,
        statistics=16,
        fitness=4,
        choice=4,
        report=16,
        recovery=TRAINED + HELD,
    )


def measure(bench: Workbench, where: str, schedule: str) -> dict[str, Any]:
    """Prune, recover and judge; tell CPU seconds, pruning included."""
    began = time.process_time()
    if where == "dense":
        return train_dense(bench, schedule)
    policy = replace(uniform(bench, ACTIONS[where]), schedule=schedule)
    bank, actions = own_bank(bench, policy), bench.per_layer(policy)
    bank.make(actions.items())
    spent = time.process_time() - began
    zeros = {
        layer: int((bank.get(layer, action).weight == 0).sum())
        for layer, action in actions.items()
        if action.steps
    }
    wanted = bench.storages(policy)
    assert all(
        count >= layer.numel - wanted[layer].kept for layer, count in zeros.items()
    ), "a pruned weight has come back"
    figures = bench.measure(policy, bank, "report", metrics=METRICS).metrics
    return {"cpu_s": spent, "zeros": sum(zeros.values()), **figures}


def train_dense(bench: Workbench, schedule: str) -> dict[str, Any]:
    """Train the dense model as a compressed one is trained, and judge it."""
    import copy

    course = course_of(bench, schedule)
    bench.stitched.restore()
    pupil_model = copy.deepcopy(bench.stitched.model).float()
    windows = bench.splits["recovery"].ids
    layers = tuple(la for la in bench.layers if la.block is not None)
    pupil = Pupil(
        model=pupil_model,
        dense=bench.stitched.model,
        inventory=bench.inventory,
        layers=layers,
        masks=FrozenMasks(pupil_model, {}),
        storages={},
        cut=(),
        task=bench.task,
        tokenizer=bench.tokenizer,
        windows=windows[:-HELD],
        validation=windows[-HELD:],
    )
    began = time.process_time()
    for recovery, settings in course.recoveries:
        with tempfile.TemporaryDirectory() as folder:
            recovery.recover(
                pupil, settings, share=1.0, folder=Path(folder), told=lambda _: None
            )
    spent = time.process_time() - began
    teacher = bench.teacher("report")
    quality = teacher.measure_first(pupil_model, None, None)
    return {
        "cpu_s": spent,
        "perplexity": quality.perplexity,
        "kl": quality.mean_kl,
    }


def uniform(bench: Workbench, text: str) -> Policy:
    """Give all blocks one action, and leave the embedding."""
    action = bench.actions.canonical(Action.parse(text))
    sites = bench.inventory.sites
    inside = {site.name: site.layers[0].block is not None for site in sites}
    return Policy({name: action if inner else DENSE for name, inner in inside.items()})


def show() -> str:
    """Write the table of the cells that are there."""
    cells = RECORDS.read("recovery-*") | RECORDS.read("moving-*")
    rows = [_row(cell) for cell in cells.values()]
    if not rows:
        return "no cell is there"
    known = {(row["where"], row["how"]): row for row in rows}
    dense = known.get(("dense", "none"))
    for row in rows:
        bare = known.get((row["where"], "none"))
        adapted = known.get(("dense", row["how"]), dense)
        if dense and bare and row["where"] != "dense":
            row["gap_closed"] = _closed(row, bare, dense)
            row["beside_dense_so_trained"] = _closed(row, bare, adapted or dense)
    table = pd.DataFrame(rows).sort_values(["where", "perplexity"])
    table.to_csv(HERE / "recovery.csv", index=False)
    return table.to_string(index=False)


def _row(cell: Mapping[str, Any]) -> dict[str, Any]:
    names = ("where", "how", "perplexity", "kl", "cpu_s")
    return {name: cell[name] for name in names}


def _closed(
    row: Mapping[str, Any], bare: Mapping[str, Any], dense: Mapping[str, Any]
) -> float:
    """Tell what share of the gap in log-perplexity is closed."""
    start, end, now = (math.log(one["perplexity"]) for one in (bare, dense, row))
    return (start - now) / (start - end) if start != end else 0.0


if __name__ == "__main__":
    main()
