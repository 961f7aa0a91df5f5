"""Shows the cells that were measured: a table, and the curves of the race."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cells import read_cells
from numpy.typing import NDArray

HERE = Path(__file__).parent
KINDS = {
    "ours": ("tab:blue", "AutoPrune, gradient"),
    "evopress": ("tab:orange", "EvoPress, same bank"),
}
FIGURES = [
    "kl",
    "choice_kl",
    "report_perplexity",
    "report_kl",
    "report_kl_error",
    "search_cpu_s",
    "bank_cpu_s",
]


def show() -> str:
    """Write the table and the picture; give the table and the race as text."""
    found = read_cells()
    if not found:
        return "no cell was measured yet\n"
    rows = [
        {
            "cell": name,
            **{key: row[key] for key in FIGURES if np.isscalar(row.get(key))},
        }
        for name, row in found.items()
    ]
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "table.csv", index=False, float_format="%.5g")
    draw(found)
    return "\n".join([table.to_string(index=False), *races(found), ""])


def races(found: dict[str, dict[str, Any]]) -> list[str]:
    """Tell when our strategy had what EvoPress ended with, on the same bank."""
    lines = []
    for name, theirs in found.items():
        if not name.startswith("evopress-") or "own" in name:
            continue
        ours = found.get(name.replace("evopress-", "ours-"))
        if ours is None:
            continue
        goal, spent = theirs["curve"][-1][1], theirs["search_cpu_s"]
        reached = [
            point[0]
            for point in ours["curve"]
            if point[2] == "complete" and point[1] <= goal
        ]
        told = f"{min(reached):.0f} CPU s" if reached else "never"
        share = f", {min(reached) / spent:.3f} of its time" if reached else ""
        lines.append(
            f"{name}: KL {goal:.4f} after {spent:.0f} CPU s; ours has it after "
            f"{told}{share}, and ends at {best(ours)[-1]:.4f}"
        )
    return lines


def best(cell: dict[str, Any]) -> list[float]:
    """Give the least KL so far after each complete trial of ours."""
    least, seen = float("inf"), []
    for point in cell["curve"]:
        if point[2] == "complete":
            least = min(least, point[1])
            seen.append(least)
    return seen


def draw(found: dict[str, dict[str, Any]]) -> None:
    """Draw KL over CPU time, one panel a target: median and range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4))
    for panel, target in zip(panels, (50, 60, 70), strict=True):
        panel.set_title(f"{target} % zeros")
        panel.set_xlabel("CPU seconds of search")
        panel.set_xscale("log")
        for kind, (color, label) in KINDS.items():
            cells = [
                cell for n, cell in found.items() if n.startswith(f"{kind}-{target}-")
            ]
            if not cells:
                continue
            end = max(cell["search_cpu_s"] for cell in cells)
            times = np.geomspace(5, end, 400)
            levels = np.stack([_levels(kind, cell, times) for cell in cells])
            panel.fill_between(
                times, levels.min(0), levels.max(0), step="post", color=color, alpha=0.2
            )
            shown = f"{label}, {len(cells)} seeds"
            panel.step(
                times, np.median(levels, 0), where="post", color=color, label=shown
            )
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    panels[0].set_ylabel("KL on the fitness split")
    figure.tight_layout()
    figure.savefig(HERE / "search.png", dpi=120)
    pyplot.close(figure)


def _levels(
    kind: str, cell: dict[str, Any], times: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Give the KL that a search had at some times; at its start before the first."""
    points = cell["curve"]
    if kind == "ours":
        points = [point for point in points if point[2] == "complete"]
        kl = np.array(best(cell))
    else:
        kl = np.array([point[1] for point in points])
    reached = np.array([point[0] for point in points])
    at = np.searchsorted(reached, times, side="right") - 1
    return kl[np.maximum(at, 0)]
