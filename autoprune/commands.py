"""What several commands do alike: configure, search, find folders."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from autoprune.reporting.session import observing


def configure(
    space: str, *, ends: Mapping[str, Any], modules: Sequence[str] = (), **changes: Any
) -> Any:
    """Read a space; ends given here stand in place of all that the file names."""
    from autoprune.config import RunConfig
    from autoprune.run import find_space

    given = {f"search__{name}": end for name, end in ends.items()}
    config = RunConfig.from_yaml(find_space(space), **given, **changes)
    search = config.search
    if any(end is not None for end in ends.values()):
        ended = {name: getattr(search, name) for name in ends if ends[name] is not None}
        unset = dict.fromkeys(("budget", "deadline", "trials"))
        search = search.model_copy(update=unset | ended)
    both = {"search": search, "plugins": [*config.plugins, *modules]}
    return config.model_copy(update=both)


def time_limits(latency: Sequence[str]) -> list[tuple[str, str]]:
    """Read limits on time, ``decode=60%``, as limits on the metrics of workloads.

    Raises:
        ConfigError: If one has no limit.
    """
    from autoprune.errors import ConfigError
    from autoprune.evaluation.latency import latency_metric_name

    found = []
    for text in latency:
        workload, equals, limit = (part.strip() for part in text.partition("="))
        if not equals:
            raise ConfigError(f"a limit on time is WORKLOAD=LIMIT, found {text!r}")
        found.append((latency_metric_name(workload), limit))
    return found


def within_time(latency: Sequence[str], device: str | None) -> dict[str, Any]:
    """Give the changes of a configuration that limit time on a device."""
    changes: dict[str, Any] = {
        f"objective__budgets__{metric}": limit for metric, limit in time_limits(latency)
    }
    if latency:
        changes["latency__workloads"] = [text.partition("=")[0] for text in latency]
    return changes | {"latency__device": device}


def search_until_stopped(
    config: Any, folder: Path, console: Console, *, export: bool = False
) -> Any:
    """Search until the end, or until the first Ctrl-C."""
    from autoprune import run
    from autoprune.reporting.interrupt import Interrupt

    now = datetime.now().astimezone()
    with (
        observing(console, budget_s=config.search.seconds(now)) as observer,
        Interrupt(lambda: observer.current, observer.note).listening() as stop,
    ):
        return run.search(config, folder, observer=observer, stop=stop, export=export)


def text_config(source: str | None) -> Any:
    """Make the configuration of a text; None if none is named."""
    from autoprune.config import TextConfig

    return TextConfig(source=source) if source else None


def new_folder(run: Path | None, space: str) -> Path:
    """Name the run folder of a search: as given, or after its space."""
    from autoprune.run import RUNS

    return run or RUNS / Path(space).stem


def run_folder(run: Path) -> Path:
    """Find a run folder by its path, or by its name among the runs."""
    from autoprune.run import RUNS
    from autoprune.searching.opening import has_rows

    named = not has_rows(run) and (RUNS / run).is_dir()
    return RUNS / run if named else run
