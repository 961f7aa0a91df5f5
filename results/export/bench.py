"""Every export target with every kind of policy, on SmolLM2-135M.

    python results/export/bench.py [CELL ...]

Each cell writes one policy as one target, has a fresh process load it again with the
target's own loader, and compares predicted bytes, every layer, the logits on 4 windows
and the perplexity on 24 x 256 tokens of the built-in text. A target that refuses says
why. Each cell is one file in ``cells/``; a cell that is there is not measured again
(names may be patterns: ``'gguf--*'``). At the end ``table.csv`` and ``table.md`` are
written from the cells there are.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from recording import Records, Row, tell  # noqa: E402

from autoprune.config import TextConfig  # noqa: E402
from autoprune.deliver import export_policy  # noqa: E402
from autoprune.errors import ExportError  # noqa: E402
from autoprune.evaluation.provenance import made_for  # noqa: E402
from autoprune.evaluation.workbench import Workbench  # noqa: E402
from autoprune.plugins import load_plugins  # noqa: E402
from autoprune.policy import Action, Policy  # noqa: E402

RECORDS = Records(HERE / "cells")
W4 = "rtn(bits=4, group=64, symmetric=true)"
PAIRS = "magnitude(pattern=2:4)"
BITS = (8, 4, 3)
"""Of the first, the second and the last third of the blocks."""

TARGETS = (
    "transformers",
    "packed",
    "compressed-tensors",
    "compressed-tensors-vllm",
    "gguf",
    "per-layer",
    "recipes",
    "onnx",
)


def sites(action: str) -> dict[str, str]:
    """Give one action to all sites of all blocks."""
    return {f"blocks.*.{part}": action for part in ("qkv", "o", "gate_up", "down")}


def policies(bench: Workbench) -> dict[str, Policy]:
    """Give the policy of every case."""
    blocks = range(len(bench.inventory.blocks))
    third = -(-len(blocks) // 3)
    mixed = {
        f"blocks.{block}.{part}": W4.replace("4,", f"{BITS[block // third]},", 1)
        for block in blocks
        for part in ("qkv", "o", "gate_up", "down")
    }
    mlp, heads = (
        "channels(keep={}, score=wanda)",
        "heads(keep=0.67, score=wanda)",
    )
    uneven = {f"blocks.{b}.mlp": mlp.format((0.9, 0.8)[b % 2]) for b in blocks}
    uneven |= {f"blocks.{b}.attention": heads for b in blocks if b % 5 == 0}
    wanted = {
        "2-4": sites(PAIRS),
        "w4-g64": sites(W4),
        "w8a8": sites("int8_dynamic"),
        "mixed-3-4-8": mixed,
        "2-4-w4": sites(f"{PAIRS} + {W4}"),
        "structured-uniform": {"blocks.*.mlp": mlp.format(0.9)},
        "structured-non-uniform": uneven,
        "dropped-blocks": {f"blocks.{b}.block": "drop" for b in (10, 20, 21)},
    }
    return {case: policy_of(bench, told) for case, told in wanted.items()}


def policy_of(bench: Workbench, told: Mapping[str, str]) -> Policy:
    """Complete a policy: what is not named stays dense."""
    named: dict[str, str] = {}
    for pattern, action in told.items():
        for block in range(len(bench.inventory.blocks)):
            named[pattern.replace("*", str(block))] = action
    found = bench.inventory.sites_for(named)
    actions = {one.name: Action.parse(named.get(one.name, "dense")) for one in found}
    assert named.keys() <= actions.keys(), "a policy names a site that is none"
    return bench.actions.canonical_policy(Policy(actions))


def measure(bench: Workbench, case: str, policy: Policy, target: str) -> Row:
    """Export a policy and tell what came of it."""
    bank = bench.bank()
    bank.make(bench.per_layer(policy).items())
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        try:
            report = export_policy(
                bench,
                bank,
                policy,
                place=Path(place) / "export",
                target=target,
                record=made_for(bench, None),
                plugins=(),
                force=False,
            )
        except ExportError as error:
            text = str(error)
            if "cannot hold this policy" not in text:
                raise
            return {"case": case, "target": target, "refused": text}
        files = [path for path in report.folder.rglob("*") if path.is_file()]
        row = {
            "case": case,
            "target": target,
            "folder_bytes": sum(path.stat().st_size for path in files),
            "seconds": round(time.monotonic() - began, 1),
            "notes": list(report.notes),
        }
    found = report.verified
    if found is None:  # no weights, nothing to load
        return row
    return row | {
        "predicted_bytes": report.size_bytes,
        "written_bytes": found.size_bytes,
        "layers_to_the_bit": found.layers,
        "logits_apart": found.logits,
        "perplexity": found.perplexity,
        "expected_perplexity": found.expected_perplexity,
        "load_seconds": found.load_seconds,
    }


def show() -> str:
    """Write the tables of the cells that are there."""
    rows = [row for row in RECORDS.read().values() if "error" not in row]
    if not rows:
        return "no cell is measured\n"
    table = pd.DataFrame(rows).drop(columns=["notes"], errors="ignore")
    table.to_csv(HERE / "table.csv", index=False)
    shown = table.pivot(index="case", columns="target", values="cell")
    for row in rows:
        shown.loc[row["case"], row["target"]] = summary(row)
    order = [name for name in TARGETS if name in shown]
    lines = [["", *order], ["---", *("---:" for _ in order)]]
    lines += [[case, *shown.loc[case, order].fillna("")] for case in shown.index]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    (HERE / "table.md").write_text(text)
    return text


def summary(row: Mapping[str, Any]) -> str:
    """Say in a few words what a cell found."""
    if "refused" in row:
        return "refused"
    if "written_bytes" not in row:
        return "written"
    written, apart = row["written_bytes"], row["logits_apart"]
    size = "=" if written == row["predicted_bytes"] else "NOT AS PREDICTED"
    logits = "bitwise" if not apart else f"{apart:.2g} nats"
    return f"{written / 1e6:.1f} MB {size}, {logits}, {row['load_seconds']:.1f} s"


def main() -> None:
    """Measure the cells that are missing, then show all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only these; * matches anything")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.show:
        text = TextConfig(window=256, statistics=8, fitness=2, choice=2, report=24)
        plugins = load_plugins()
        known = plugins.objects["exporters"]
        bench = Workbench.open(
            plugins, model="demo", task="causal-lm", text=text, target="packed", seed=0
        )
        for case, policy in policies(bench).items():
            for target in (name for name in TARGETS if name in known):
                if RECORDS.lacks(name := f"{target}--{case}", arguments.cells):
                    tell(name)
                    try:
                        row = measure(bench, case, policy, target)
                    except Exception as error:  # told, and tried again next time
                        row = {"error": f"{type(error).__name__}: {error}"}
                        tell(row["error"])
                    RECORDS.write(name, row)
    sys.stdout.write(show())


if __name__ == "__main__":
    main()
