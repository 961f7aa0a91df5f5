"""Shows the cells that were measured: a table, and the curves of the race."""

from pathlib import Path
from typing import Any

import pandas as pd
from cells import read_cells

HERE = Path(__file__).parent
FIGURES = ["report_perplexity", "report_kl", "report_kl_error", "search_cpu_s"]


def show() -> str:
    """Write the table and the picture; give the table and the race as text."""
    found = read_cells()
    if not found:
        return "no cell was measured yet\n"
    rows = [
        {"cell": name, **{key: row.get(key) for key in FIGURES if key in row}}
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
    """Draw KL over CPU time, one panel a target; a band where there are more seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4))
    for panel, target in zip(panels, (50, 60, 70), strict=True):
        panel.set_title(f"{target} % zeros")
        panel.set_xlabel("CPU seconds of search")
        for kind, color in (("ours", "tab:blue"), ("evopress", "tab:orange")):
            for name, cell in found.items():
                if not name.startswith(f"{kind}-{target}-"):
                    continue
                curve = cell["curve"]
                if kind == "ours":
                    curve = [point for point in curve if point[2] == "complete"]
                    levels = best(cell)
                else:
                    levels = [point[1] for point in curve]
                times = [max(point[0], 1) for point in curve]
                panel.step(times, levels, color=color, where="post", alpha=0.8)
        panel.plot([], [], color="tab:blue", label="AutoPrune, gradient")
        panel.plot([], [], color="tab:orange", label="EvoPress, same bank")
        panel.set_xscale("log")
    panels[0].set_ylabel("KL on the fitness split")
    panels[-1].legend()
    figure.tight_layout()
    figure.savefig(HERE / "search.png", dpi=120)
    pyplot.close(figure)
