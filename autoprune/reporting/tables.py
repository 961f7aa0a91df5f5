"""Tables for people: trials, finals, exports, plugins; 80 columns will do."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from autoprune.reporting.status import RunStatus

FIGURES = ("kl", "perplexity", "size_bytes", "compression_ratio")
"""Metrics that a table of trials shows besides the goals, while they fit."""

MOST_FIGURES = 5
"""Metrics that fit into 80 columns beside a policy's origin."""

PLAIN = "transformers"
"""The target whose size every table of a search's end shows beside the run's own."""

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def value(name: str, number: float) -> str:
    """Write a metric's value for people, by the unit that its name ends in.

    Example:
        >>> value("size_bytes", 70_000_000), value("kl", 0.0123456)
        ('70.00 MB', '0.01235')
        >>> value("compression_ratio", 3.8421), value("size_bytes", 12.0)
        ('3.84x', '12 B')
    """
    if name.endswith("_bytes"):
        for scale, unit in _UNITS:
            if number >= scale:
                return f"{number / scale:.2f} {unit}"
        return f"{number:.0f} B"
    if name.endswith("_ratio"):
        return f"{number:.2f}x"
    if 1e4 <= abs(number) < 1e9:
        return f"{number:.0f}"
    if abs(number) < 1e-7:  # rounding of a divergence that is none
        return "0"
    return f"{number:#.4g}"


def duration(seconds: float) -> str:
    """Write a time span for people.

    Example:
        >>> [duration(seconds) for seconds in (0.0351, 4.26, 75, 3700)]
        ['35 ms', '4.3 s', '1 min 15 s', '1 h 01 min']
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def status_parts(status: "RunStatus") -> list[str | Table]:
    """Tell how a run stands, in lines and tables."""
    of = f" of {status.wanted}" if status.wanted else ""
    ends = ", ".join(f"{count} {state}" for state, count in status.states().items())
    parts: list[str | Table] = [
        f"{status.run_dir}: {len(status.trials)}{of} trials ({ends or 'none'})",
        "wanted: " + ", ".join(f"{way} {name}" for name, way in status.goals),
    ]
    if status.mean_trial_s is not None:
        pace = f"{duration(status.mean_trial_s)} a trial"
        if status.left_s:
            pace += f", {duration(status.left_s)} left at that pace"
        ended = status.trials[-1].finished[:19].replace("T", " ")
        parts.append(f"{pace}; the last ended {ended} UTC")
    if status.times:
        parts.append(f"times are predicted, from {status.times}")
    goals = [name for name, _ in status.goals]
    if status.best:
        parts.append(trials_table(status.best, goals, title="Best trials"))
    for name, (best, count) in status.further.items():
        parts.append(f"{name}: {count} trials")
        if best:
            parts.append(trials_table(best, goals, title=f"Best trials of {name}"))
    if status.front:
        title = "Front: trials that no other beats"
        parts.append(trials_table(status.front, goals, title=title))
    if status.finals:
        parts.append(finals_table(status.finals))
    return parts


def search_parts(result: Any) -> list[str | Table]:
    """Tell what a search found, in tables and lines.

    Args:
        result: A ``SearchResult``.
    """
    count = f"{len(result.trials)} trials, in {result.run_dir}"
    if result.ended == "stopped":
        return [f"Stopped after {count}. The same command goes on from there."]
    return [
        finals_table(result.finals),
        f"Ended after {count} ({_ENDS[result.ended]}).",
        f"To export the winner: autoprune export {result.run_dir}",
    ]


_ENDS = {
    "trials": "as many as wanted",
    "time": "the time is used up",
    "exhausted": "nothing new is left within the budgets",
}
"""Why a search ended, for people."""


def solutions_parts(found: Sequence[Any]) -> list[str | Table]:
    """Tell what was solved for: additive metrics, and what the model says of the KL."""
    table = plain_table("Solved, not measured")
    names = list(found[0].metrics)
    for heading in [*names, "model of the KL"]:
        table.add_column(heading, justify="right")
    for one in found:
        cells = [value(name, one.metrics[name]) for name in names]
        table.add_row(*cells, f"{one.cost:.4g}")
    return [
        table,
        f"By {found[0].model}. To know its quality: autoprune evaluate MODEL --policy",
    ]


def trials_table(trials: Sequence[Any], goals: Iterable[str], *, title: str) -> Table:
    """Make a table of trials, in the order given.

    Args:
        trials: Rows of the ledger.
        goals: Metrics that are wanted; they come first.
        title: What the trials are.
    """
    wanted = list(dict.fromkeys([*goals, *FIGURES]))
    known = trials[0].metrics if trials else {}
    names = [name for name in wanted if name in known][:MOST_FIGURES]
    table = plain_table(title)
    table.add_column("trial", justify="right")
    for name in names:
        table.add_column(_heading(name), justify="right")
    table.add_column("origin", ratio=1)
    for trial in trials:
        figures = [value(name, trial.metrics[name]) for name in names]
        table.add_row(str(trial.number), *figures, trial.origin)
    return table


def finals_table(finals: Mapping[str, Any]) -> Table:
    """Make the table of a search's end: dense model, rivals and winner.

    Args:
        finals: Figures on the report split, as in ``finals.json``.
    """
    winner = finals["winner"]
    rows = [{"sizes": finals["dense_sizes"]}, *finals["rivals"], winner]
    # The run's own target, and the plain one; the rest stands in the model card.
    every: Mapping[str, int] = finals["dense_sizes"]
    columns = dict.fromkeys([next(iter(every)), PLAIN])
    held = [name for name in columns if all(name in row["sizes"] for row in rows)]
    dense = {name: every[name] for name in held}
    table = plain_table("On text that the search never saw")
    table.add_column("policy", ratio=1)
    timed = [f"{name} time" for name in winner.get("latency", {})]
    for heading in ("perplexity", "KL", *dense, *timed):
        table.add_column(heading, justify="right")
    rivals = [row for row in finals["rivals"] if row["trial"] != winner["trial"]]
    plain = _finals_row({"report": finals["dense"], "sizes": dense}, dense)
    table.add_row("dense", *plain, *("" for _ in timed))
    for row in rivals:
        table.add_row(f"rival, {_whose(row)}", *_finals_row(row, dense))
    cells = _finals_row(winner, dense)
    table.add_row(f"winner, {_whose(winner)}", *cells, style="bold")
    if timed:
        (basis, *_) = (told["basis"] for told in winner["latency"].values())
        table.caption = f"Times are predicted. {basis}"
        table.caption_justify = "left"
    return table


def _finals_row(row: Mapping[str, Any], dense: Mapping[str, int]) -> list[str]:
    report, error = row["report"], row.get("kl_standard_error")
    kl = value("kl", report["kl"]) + (f"\n±{error:.1g}" if error is not None else "")
    sizes = []
    for name, full in dense.items():
        size = row["sizes"][name]
        ratio = f"\n{full / size:.2f}x" if "trial" in row else ""  # none for dense
        sizes.append(value("size_bytes", size) + ratio)
    times = [_time(forecast) for forecast in row.get("latency", {}).values()]
    return [value("perplexity", report["perplexity"]), kl, *sizes, *times]


def _time(forecast: Mapping[str, Any]) -> str:
    """Write a predicted time, and how many times as fast as dense that surely is."""
    ratio, low, high = forecast["over_dense"]
    gain = f"{1 / ratio:.2f}x" if ratio else "none left"
    sure = f"\n{1 / high:.2f}-{1 / low:.2f}" if 0 < low < high else ""
    return f"{forecast['ms']:.4g} ms\n{gain}{sure}"


def _whose(row: Mapping[str, Any]) -> str:
    return f"trial {row['trial']}: {row['origin']}"


def metrics_table(columns: Mapping[str, Mapping[str, float]], *, title: str) -> Table:
    """Make a table of all metrics, one column a model."""
    table = plain_table(title)
    table.add_column("metric")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name in next(iter(columns.values())):
        cells = [value(name, metrics[name]) for metrics in columns.values()]
        table.add_row(name, *cells)
    return table


def plugins_table(records: Iterable[Any]) -> Table:
    """Make a table of plugins: what each registered, or why it was left out."""
    table = plain_table("Plugins")
    table.add_column("plugin")
    table.add_column("package")
    table.add_column("registers", ratio=1, overflow="fold")
    for record in records:
        kinds: dict[str, list[str]] = {}
        for item in record.objects:
            kind, _, name = item.partition(":")
            kinds.setdefault(kind.replace("_", " "), []).append(name)
        lines = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items()]
        lines += [hook for hook in record.hooks if not hook.startswith("register_")]
        what, style = record.error or "\n".join(lines), "red" if record.error else ""
        table.add_row(record.name, record.distribution, what, style=style)
    return table


def _heading(name: str) -> str:
    """Shorten a metric's name; the unit stands in the cells."""
    return name.removesuffix("_bytes").removeprefix("compression_").replace("_", "\n")


def plain_table(title: str) -> Table:
    """Make an empty table of the one look that all have."""
    return Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
