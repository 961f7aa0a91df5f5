"""What several commands do alike: configure, search, find folders."""

from collections.abc import Mapping, Sequence
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
        search = search.model_copy(update={"budget": None, "trials": None} | ended)
    both = {"search": search, "plugins": [*config.plugins, *modules]}
    return config.model_copy(update=both)


def search_until_stopped(config: Any, folder: Path, console: Console) -> Any:
    """Search until the end, or until the first Ctrl-C."""
    from autoprune import run
    from autoprune.reporting.interrupt import Interrupt

    with (
        observing(console, budget_s=config.search.budget) as observer,
        Interrupt(lambda: observer.current, observer.note).listening() as stop,
    ):
        return run.search(config, folder, observer=observer, stop=stop)


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

    named = not (run / "ledger.sqlite").exists() and (RUNS / run).is_dir()
    return RUNS / run if named else run
