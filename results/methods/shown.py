"""Shows the cells that were measured: a table, a picture, and the expected orders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from expected import verdicts
from records import RECORDS

HERE = Path(__file__).parent
COLUMNS = [
    "perplexity",
    "kl",
    "kl_error",
    "bits_per_weight",
    "sparsity",
    "block_bytes",
    "size_bytes",
    "make_cpu_s",
    "peak_bytes",
]
PANELS = {
    "50": "50 % zeros",
    "2-4": "2:4",
    "70": "70 % zeros",
    "8bit": "8 bits",
    "4bit": "4 bits",
    "3bit": "3 bits",
    "mlp-25": "25 % of channels",
    "joint-3.3": "2:4 and 4 bits",
    "4.1": "4.1 bits",
}
"""Ends of the names of cells that are drawn side by side."""


def show() -> str:
    """Write the table and the picture; give table, failures and orders as text."""
    found = RECORDS.read()
    good = {name: cell for name, cell in found.items() if "error" not in cell}
    if not good:
        return "\n".join(["no cell was measured yet", *failures(found), ""])
    rows = [
        {"cell": name, **{key: cell[key] for key in COLUMNS}, "date": cell["date"]}
        for name, cell in good.items()
    ]
    table = pd.DataFrame(rows).sort_values(["bits_per_weight", "kl"])
    table.to_csv(HERE / "table.csv", index=False, float_format="%.6g")
    draw(good)
    text = table.to_string(index=False, float_format="{:.5g}".format)
    return "\n".join([text, *failures(found), *verdicts(good), ""])


def failures(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tell which cells failed, and why."""
    return [
        f"failed: {name}: {cell['error']}"
        for name, cell in found.items()
        if "error" in cell
    ]


def draw(cells: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the KL of the methods, best first, one panel a kind of setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(3, 3, figsize=(14, 12))
    for panel, (end, title) in zip(grid.flat, PANELS.items(), strict=True):
        panel.set_title(title)
        bars = sorted((c["kl"], n) for n, c in cells.items() if _belongs(n, end))
        if not bars:
            continue
        names = [name.removesuffix(f"-{end}") for _, name in bars]
        panel.barh(names, [kl for kl, _ in bars], color="tab:blue")
        panel.invert_yaxis()
        panel.set_xscale("log")
        panel.set_xlabel("KL to the dense model, report split")
    figure.tight_layout()
    figure.savefig(HERE / "methods.png", dpi=110)
    pyplot.close(figure)


def _belongs(name: str, end: str) -> bool:
    """Tell a cell of a panel from one that changes attentions alone, or does both."""
    elsewhere = "attention" in name or ("joint" in name and "joint" not in end)
    return name.endswith(f"-{end}") and not elsewhere
