"""What was exported and verified, as people read it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from autoprune.reporting.tables import plain_table, value


def exports_parts(reports: Sequence[Any]) -> list[str | Table]:
    """Tell what was exported, and how to load it."""
    lines = ["To load them:" if len(reports) > 1 else "To load it:"]
    for usage in dict.fromkeys(report.usage for report in reports):
        lines += [f"  {line}" for line in usage.splitlines() if line]
    notes = [f"{report.target}: {note}" for report in reports for note in report.notes]
    return [exports_table(reports), "\n".join([*notes, *lines])]


def exports_table(reports: Iterable[Any]) -> Table:
    """Make a table of exports that were written and verified."""
    table = plain_table("Exported, and verified in a fresh process")
    headings = ("target", "size", "perplexity", "loaded again", "layers", "logits")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "target" else "right")
    for report in reports:
        found = report.verified
        again = _found(found) if found else ["not loaded", "", ""]
        table.add_row(
            report.target,
            value("size_bytes", report.size_bytes),
            value("perplexity", report.metrics["perplexity"]),
            *again,
        )
    return table


def verified_table(found: Any, *, title: str) -> Table:
    """Make a table of what a check of an export found."""
    table = plain_table(title)
    headings = ("size", "perplexity", "loaded again", "layers", "logits")
    for heading in headings:
        table.add_column(heading, justify="right")
    expected = value("perplexity", found.expected_perplexity)
    table.add_row(value("size_bytes", found.size_bytes), expected, *_found(found))
    return table


def _found(found: Any) -> list[str]:
    """Write what a fresh process found: perplexity, layers, distance of the logits."""
    layers = f"{found.layers} to the bit" if found.layers else "not compared"
    apart = f"within {found.logits:.2g} nats" if found.logits else "to the bit"
    return [value("perplexity", found.perplexity), layers, apart]


_TARGETS = ("target", "what is written", "what loads it")


def targets_table(targets: Sequence[Mapping[str, str]]) -> Table:
    """Make the table of export targets."""
    table = plain_table("Export targets")
    for heading in _TARGETS:
        table.add_column(heading, ratio=2 if heading != "target" else None)
    for target in targets:
        table.add_row(*target.values())
    return table


def targets_markdown(targets: Sequence[Mapping[str, str]]) -> str:
    """Make the table of export targets for the README."""
    rows = [[f"`{one['name']}`", one["stores"], one["loads_in"]] for one in targets]
    lines = [_TARGETS, ("---",) * len(_TARGETS), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
