"""Time for people: which formats pay on a device, and what an export really takes."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

WHOLE = "whole model"

PHASES = {"prefill": "layers while prompts are read", "decode": "layers in each step"}

LEGEND = (
    "Times as fast as dense; `?` where it cannot be told whether it is faster at all, "
    "`-` where there is no kernel, so it runs as the next simpler format."
)


def advice_parts(advice: Any) -> list[str | Table]:
    """Tell what was found, in lines and tables.

    For every workload: what each layer gains in prefill and in decode, and then what
    the whole model gains.

    Args:
        advice: An ``Advice``.
    """
    parts: list[str | Table] = [f"{advice.model} on {advice.device}", *advice.notes]
    for workload, ms in advice.dense_ms.items():
        gains = [gain for gain in advice.gains if gain.workload == workload]
        for phase, title in PHASES.items():
            own = [gain for gain in gains if gain.phase == phase]
            parts.append(_layers(f"{workload}: {title}", own))
        whole = [gain for gain in gains if gain.where == WHOLE]
        parts.append(_whole(f"{workload}: {WHOLE}, {ms:.4g} ms dense", whole))
    return [*parts, LEGEND]


def _layers(title: str, gains: Sequence[Any]) -> Table:
    """Make a table with a row a shape; layers of one shape gain the same."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("layers", overflow="fold")
    changes = list(dict.fromkeys(gain.change for gain in gains))
    for change in changes:
        table.add_column(change.replace("+", "+\n"), justify="right")
    shapes: dict[str, list[str]] = {}
    for where in dict.fromkeys(gain.where for gain in gains):
        role, _, shape = where.partition(" ")
        shapes.setdefault(shape, []).append(role)
    for shape, roles in shapes.items():
        own = {g.change: g for g in gains if g.where == f"{roles[0]} {shape}"}
        cells = [_factor(own[change]) for change in changes]
        names = ", ".join(role.removesuffix("_proj") for role in roles)
        table.add_row(f"{names}\n{shape}", *cells)
    return table


def _whole(title: str, gains: Sequence[Any]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("change")
    table.add_column("as fast", justify="right")
    table.add_column("in 80 of 100 cases", justify="right")
    table.add_column("verdict")
    for gain in gains:
        sure = f"{1 / gain.high:.2f} to {1 / gain.low:.2f}" if gain.low else ""
        table.add_row(gain.change, _factor(gain), sure, gain.verdict)
    return table


def _factor(gain: Any) -> str:
    """Write a gain as a factor of speed."""
    if gain.verdict == "no kernel":
        return "-"
    mark = "?" if gain.verdict == "cannot be told" else ""
    return f"{1 / gain.ratio:.2f}x{mark}" if gain.ratio else "none left"


def proven_parts(proven: Any) -> list[str | Table]:
    """Tell what running an export told: predicted beside measured.

    Args:
        proven: A ``Proven``.
    """
    title = f"On {proven.device}, by the clock"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("pass")
    for heading in ("predicted", "measured", "off by", "over dense", "predicted"):
        table.add_column(heading, justify="right")
    for one in proven.proofs:
        low, high = one.interval_ms
        table.add_row(
            f"{one.workload}, {one.phase}" + (" (noisy)" if one.noisy else ""),
            f"{one.predicted_ms:.4g} ms\n{low:.4g} to {high:.4g}",
            f"{one.measured_ms:.4g} ms",
            f"{one.error:+.0%}",
            f"{one.ratio:.2f}",
            f"{one.predicted_ratio:.2f}",
        )
    kernels = [f"{count} layers on {name}" for name, count in proven.kernels.items()]
    return [table, ", ".join(kernels) or "all layers on dense kernels", *proven.notes]
