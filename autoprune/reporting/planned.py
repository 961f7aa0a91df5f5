"""A planned run for people: hours by phase, memory by process, disk by purpose."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

LEGEND = (
    "Hours are of one thread, or one GPU; in brackets the best and the worst case. "
    "Workers share the trials out, the driver does the rest."
)


def planned_parts(planned: Any) -> list[str | Table]:
    """Tell a plan in lines and tables.

    Args:
        planned: A ``Foreseen``.
    """
    beside = f", {planned.workers} workers" if planned.workers else ""
    title = (
        f"{planned.model} on {planned.device}{beside}: {planned.sites} sites to choose "
        f"for, {planned.variants} variants, {planned.trials} trials"
    )
    return [
        title,
        f"Rates: {planned.basis}.",
        _phases(planned),
        _memory(planned),
        _disk(planned),
        *planned.notes,
        LEGEND,
    ]


def time_text(seconds: float) -> str:
    """Write seconds as people say them.

    Example:
        >>> time_text(12), time_text(90), time_text(5400)
        ('12 s', '1.5 min', '1.5 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"


def size_text(size: float) -> str:
    """Write bytes as people say them.

    Example:
        >>> size_text(2_340_000), size_text(1.5e9)
        ('2.3 MB', '1.50 GB')
    """
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column(headings[0])
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _phases(planned: Any) -> Table:
    table = _table("Time", ("phase", "as expected", "best", "worst"))
    rows = [(phase.name, phase.span) for phase in planned.phases]
    rows += [("one trial", planned.trial)]
    rows += [("in all", planned.busy), ("until it ends", planned.wall)]
    for name, span in rows:
        times = (span.middle, span.low, span.high)
        table.add_row(name, *map(time_text, times), end_section=name == "export")
    return table


def _memory(planned: Any) -> Table:
    table = _table("Memory at the most", ("what", "driver", "each worker"))
    names = {
        "base": "interpreter, libraries",
        "heads": "heads",
        "held": "variants in use",
        "prefix": "hidden states",
        "working": "gradients, solvers",
        "own": "in all",
        "shared": "the model, one time a machine",
    }
    for field, told in names.items():
        both = (getattr(one, field) for one in (planned.driver, planned.worker))
        table.add_row(told, *map(size_text, both))
    table.add_row("one machine, all", size_text(planned.machine_bytes), "")
    return table


def _disk(planned: Any) -> Table:
    table = _table("Disk", ("what", "bytes"))
    sizes: Mapping[str, int] = planned.disk
    for name, size in sizes.items():
        table.add_row(name, size_text(size))
    low, high = planned.export
    table.add_row("an export", f"{size_text(low)} to {size_text(high)}")
    return table
