"""Shows the arms of ``from_scratch.py``: a table with paired differences, a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from arms import AFTER, BEFORE, DURING, LEVELS
from channel_arms import CHANNELS
from numpy.typing import NDArray
from scipy import stats

HERE = Path(__file__).parent
COLORS = {"before": "tab:green", "during": "tab:orange", "after": "tab:blue"}

HALVES = {"half": "dense, half trained", "bare": "that, pruned only"}
"""What one-shot pruning goes through: no arms, as they take fewer steps."""

Cells = Mapping[str, Mapping[str, Any]]


def show(found: Cells) -> str:
    """Write the table and the picture; give the table as text."""
    rows = [row for title in panels() for row in rows_of(found, title)]
    if not rows:
        return "no cell was measured yet\n"
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "from_scratch.csv", index=False, float_format="%.4g")
    draw(table)
    return table.to_string(index=False, float_format="{:.2f}".format) + "\n"


def panels() -> list[str]:
    """Name what is compared: a scene at a sparsity, or with channels cut."""
    by_weight = [f"{s}-{100 * x:.0f}" for s, levels in LEVELS.items() for x in levels]
    long = [f"{s}-long-{100 * levels[0]:.0f}" for s, levels in LEVELS.items()]
    return [*by_weight, *long, "resnet-channels"]


def rows_of(found: Cells, panel: str) -> list[dict[str, Any]]:
    """Give the rows of a panel: the dense model, then arms, best first."""
    control = found.get(f"{panel}-one-shot", found.get(f"{panel}-filter-norms"))
    full = found.get(f"{panel.split('-')[0]}-dense")
    arms = {
        name.removeprefix(f"{panel}-"): cell
        for name, cell in found.items()
        if name.startswith(f"{panel}-")
    }
    if control is None or full is None:
        return []
    rows = [row(panel, name, cell, control) for name, cell in arms.items()]
    for key, name in HALVES.items():
        rows.append(row(panel, name, {**control, "accuracy": control[key]}, control))
    rows.sort(key=lambda one: -one["accuracy"])
    return [row(panel, "dense", full, control), *rows]


def row(
    panel: str, name: str, cell: Mapping[str, Any], control: Mapping[str, Any]
) -> dict[str, Any]:
    """Give an arm's mean accuracy, and its difference to the control in pairs."""
    points = 100 * np.array(cell["accuracy"])
    low, mean, high = interval(points - 100 * np.array(control["accuracy"]))
    verdict = "tie" if low <= 0 <= high else "better" if low > 0 else "worse"
    return {
        "panel": panel,
        "arm": name,
        "when": when(name),
        "accuracy": points.mean(),
        "spread": points.std(ddof=1),
        "difference": mean,
        "low": low,
        "high": high,
        "verdict": verdict if low < high else "control",
        "seeds": len(points),
        "cpu_s": float("nan") if name in HALVES.values() else np.mean(cell["seconds"]),
    }


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Give a mean between the ends of its 95 % interval, by Student's t."""
    mean, count = float(values.mean()), len(values)
    error = float(values.std(ddof=1)) / count**0.5
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return mean - reach, mean, mean + reach


def when(arm: str) -> str:
    """Tell when an arm prunes; nothing for what is no arm."""
    if arm in BEFORE:
        return "before"
    if arm in DURING or arm in {"group-lasso", "slimming"}:
        return "during"
    return "after" if arm in {**AFTER, **CHANNELS} else ""


def draw(table: pd.DataFrame) -> None:
    """Draw the differences to one-shot pruning with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 4, figsize=(20, 8))
    for axes in grid.flat:
        axes.set_axis_off()
    every = table.groupby("panel", sort=False)
    for axes, (panel, rows) in zip(grid.flat, every, strict=False):
        axes.set_axis_on()
        arms = rows[rows["when"] != ""]
        reach = [arms["difference"] - arms["low"], arms["high"] - arms["difference"]]
        colors = [COLORS[one] for one in arms["when"]]
        axes.barh(arms["arm"], arms["difference"], color=colors, xerr=reach)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        full = rows[rows["arm"] == "dense"]["difference"].iloc[0]
        axes.axvline(full, color="gray", linestyle="--", linewidth=0.8)
        axes.set_title(str(panel))
        axes.set_xlabel("points of accuracy over the control; dashed: dense")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=c) for c in COLORS.values()]
    figure.legend(handles, list(COLORS), loc="lower right", title="pruned")
    figure.tight_layout()
    figure.savefig(HERE / "from_scratch.png", dpi=110)
    pyplot.close(figure)
