"""The whole path: a configuration in, a run folder with the best policy out."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from autoprune.conclusion import conclude, winner_record
from autoprune.config import RunConfig
from autoprune.deliver import ExportReport, export_policy
from autoprune.errors import ConfigError, unknown_name
from autoprune.parts import RANDOM_RIVAL, Part, Surroundings, plans_of, search_part
from autoprune.plugins import load_plugins
from autoprune.policy import Policy
from autoprune.reporting.machine import to_json
from autoprune.reporting.observer import Observer
from autoprune.retraining import check_recovery, recovery_of
from autoprune.searching.addresses import parse_url, plain
from autoprune.searching.clock import Clock, Timetable
from autoprune.searching.engines import open_crew
from autoprune.searching.finals import Finalist, best_so_far
from autoprune.searching.ledger import Ledger
from autoprune.searching.memory_limit import held_memory
from autoprune.searching.mirrored import shown
from autoprune.searching.plan import Plan
from autoprune.searching.reserve import Reserve
from autoprune.searching.room import Room
from autoprune.searching.runs import CONFIG, REFERENCE, write_text

RUNS = Path("results/runs")
"""Where run folders are made by default, under the configuration's name."""

SPACES = "autoprune_spaces"
"""The package of the spaces that ship: the folder ``search_spaces``."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        run_dir: The run folder.
        policy: The winner; of a search that was stopped the best so far, None if no
            trial had kept every limit yet.
        finals: Figures of the dense model, the winner and the best rival, on the
            choice and report splits; as in ``finals.json``. Empty if it was stopped.
        trials: One row a trial.
        ended: Why the search ended: ``trials``, ``time``, ``disk``, ``stopped``,
            ``exhausted``.
        exports: The winner's export, if it was asked for.
    """

    run_dir: Path
    policy: Policy | None
    finals: Mapping[str, Any]
    trials: pd.DataFrame
    ended: str
    exports: Sequence[ExportReport] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give the result as plain data, ready for JSON."""
        return {
            "run": str(self.run_dir),
            "ended": self.ended,
            "trials": len(self.trials),
            "policy": self.policy.to_dict() if self.policy else None,
            "finals": dict(self.finals),
        }


def search(
    config: RunConfig | str | Path,
    run_dir: str | Path | None = None,
    *,
    observer: Observer | None = None,
    stop: Callable[[], bool] | None = None,
    export: bool = False,
    clock: Clock | None = None,
    **changes: Any,
) -> SearchResult:
    """Find the best policy of a space within the budgets.

    The same call on the same run folder goes on where it stopped.

    Args:
        config: A configuration, the path of its YAML file, or the bare name of a
            space that ships: ``quick``.
        run_dir: The run folder; ``results/runs/<name of the file>`` by default.
        observer: Hears of stages and trials.
        stop: Asked between trials; True ends the search there, without finals.
        export: Export the winner as well, into ``export-TARGET`` in the run folder; an
            export that is there is replaced. Its time is part of the budget.
        clock: By which the time budget runs; the real one by default.
        **changes: Replace values of the file: ``search__trials=10``.

    Raises:
        ConfigError: If the configuration is wrong or no policy meets the budgets.
        RunError: If the run folder belongs to another run, or is in use; or the time
            budget ends before the first trial.
        AutoPruneError: If model, text or a plugin fails.
    """
    if not isinstance(config, RunConfig):
        run_dir = run_dir or RUNS / Path(config).stem
        config = RunConfig.from_yaml(find_space(config), **changes)
    clock = clock or Clock()
    table = Timetable.start(clock, config.search.seconds(clock.wall()))
    folder = Path(run_dir or RUNS / "search")
    observer = observer or Observer()
    observer.stage("loading model and text")
    first = Plan.make(config, load_plugins(config.plugins))
    check_recovery(first)
    _tell(first, observer)
    searched: list[Part] = []
    with ExitStack() as opened:
        opened.enter_context(held_memory(_own_memory(config)))
        for place, share, plan in plans_of(first, searched, observer):
            ledger = opened.enter_context(
                Ledger.open(folder, plan.fingerprint, url=config.ledger, part=place)
            )
            searched.append(Part(place, share, plan, ledger))
            if place:
                _note_reference(folder / place, plan)
            else:
                _note_settings(folder, config)
                table.recall(folder)
                room = Room.of(first, folder, export=export)
                crew = opened.enter_context(open_crew(first, folder))
                around = Surroundings(
                    crew, table, observer, stop or (lambda: False), room, export
                )
            ended = search_part(searched[-1], around)
            if ended == "stopped":
                return _stopped(folder, searched)
        crew.close()  # its memory serves the finalists
        observer.stage("choosing among finalists")
        parts = [part.searched for part in searched]
        reserve = Reserve.of(first, table, parts[0].trials, export=export)
        if table.budget:
            observer.note(
                f"of {table.left():.0f} s left, the end should take {reserve}"
            )
        recover = recovery_of(
            first,
            folder,
            observer,
            left=lambda: table.left() - reserve.last,
            now=table.clock.now,
            stop=around.stop,
        )
        winner, finals = conclude(parts, observer, table.left, reserve, recover)
        record = winner_record(first, winner, finals)
        write_text(folder / "finals.json", to_json(finals))
        write_text(folder / "policy.json", to_json(record))
        reports = [_deliver(first, winner, record, folder, observer)] if export else []
        policy = winner.candidate.policy
        return SearchResult(folder, policy, finals, _table(searched), ended, reports)


def _stopped(folder: Path, searched: Sequence[Part]) -> SearchResult:
    """Give what a search has found that was told to stop."""
    found = [part.searched.trials for part in searched if part.place != RANDOM_RIVAL]
    last = found[-1] or found[0]
    best_now = best_so_far(last, searched[0].plan.objective)
    return SearchResult(folder, best_now, {}, _table(searched), "stopped")


def _deliver(
    plan: Plan,
    winner: Finalist,
    record: dict[str, Any],
    folder: Path,
    observer: Observer,
) -> ExportReport:
    """Export the winner as the run's own target."""
    target = plan.config.export
    observer.stage(f"exporting trial {record['trial']} as {target}")
    return export_policy(
        plan.bench,
        winner.bank,
        winner.candidate.policy,
        place=folder / f"export-{target}",
        target=target,
        record=record,
        plugins=plan.config.plugins,
        force=True,
    )


def _own_memory(config: RunConfig) -> float | None:
    """Tell how much memory this process may take, beside its workers."""
    limit = config.search.memory
    return limit and limit / (1 + (config.workers.count or 0))


def _note_settings(folder: Path, config: RunConfig) -> None:
    """Write what a run was begun with, but for passwords."""
    told = config.model_dump(mode="json")
    if config.ledger:
        told["ledger"] = plain(parse_url(config.ledger))
    if config.mirror:
        told["mirror"] = shown(config.mirror)
    write_text(folder / CONFIG, yaml.safe_dump(told))


def _note_reference(place: Path, plan: Plan) -> None:
    """Write whose inputs the variants of a further round were made on."""
    if plan.reference is not None:
        write_text(place / REFERENCE, to_json(plan.reference.to_dict()))


def _table(searched: Sequence[Part]) -> pd.DataFrame:
    """Give the trials of all rounds as one table."""
    rounds = [part.ledger.frame() for part in searched if part.place != RANDOM_RIVAL]
    if len(rounds) == 1:
        return rounds[0]
    numbered = [one.assign(round=n) for n, one in enumerate(rounds, start=1)]
    return pd.concat(numbered, ignore_index=True)


def find_space(name: str | Path) -> Path:
    """Find the YAML file of a space: its path, or the bare name of one that ships.

    Raises:
        ConfigError: If there is neither; lists near misses.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(files(SPACES)))
    shipped = {path.stem: path for path in folder.glob("*.yaml")}
    if str(name) not in shipped:
        raise ConfigError(
            f"{unknown_name('space', str(name), shipped)}. Name one of these, or the "
            f"path of a YAML file (looked in {Path.cwd()})"
        )
    return shipped[str(name)]


def _tell(plan: Plan, observer: Observer) -> None:
    """Say what the space is, and what was left out of it."""
    space = plan.problem.space
    for note in plan.notes:
        observer.note(note)
    for site, action, reason in space.refused:
        observer.note(f"{site} cannot take {action}: {reason}")
    free = sum(len(actions) > 1 for actions in space.choices.values())
    observer.note(
        f"{free} sites to choose for, 10^{math.log10(space.policies):.0f} policies"
    )
