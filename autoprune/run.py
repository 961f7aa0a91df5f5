"""The whole path: a configuration in, a run folder with the best policy out."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from autoprune.conclusion import Searched, conclude, winner_record
from autoprune.config import RunConfig
from autoprune.errors import ConfigError, RunError, unknown_name
from autoprune.plugins import load_plugins
from autoprune.policy import Policy
from autoprune.preflight import preflight
from autoprune.reporting.machine import to_json
from autoprune.reporting.observer import SEARCHING, Observer
from autoprune.searching.finals import best_so_far
from autoprune.searching.frozen import FrozenProblem
from autoprune.searching.ledger import Ledger
from autoprune.searching.plan import Plan
from autoprune.searching.rivals import as_random_rival, random_rival, solved_rivals
from autoprune.searching.rows import Trial
from autoprune.searching.runs import REFERENCE, write_text
from autoprune.searching.study import run_study

RUNS = Path("results/runs")
"""Where run folders are made by default, under the configuration's name."""

RANDOM_RIVAL = "rival-random"
"""Folder of the random search in a run folder."""

SPACES = "autoprune_spaces"
"""The package of the spaces that ship: the folder ``search_spaces``."""


_Part = tuple[str, Plan, Ledger]
"""A part of a run: its folder in the run folder, its plan and its ledger."""


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
        ended: Why the search ended: ``trials``, ``time``, ``stopped``, ``exhausted``.
    """

    run_dir: Path
    policy: Policy | None
    finals: Mapping[str, Any]
    trials: pd.DataFrame
    ended: str

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
        **changes: Replace values of the file: ``search__trials=10``.

    Raises:
        ConfigError: If the configuration is wrong or no policy meets the budgets.
        RunError: If the run folder belongs to another run, or is in use; or the time
            budget ends before the first trial.
        AutoPruneError: If model, text or a plugin fails.
    """
    began = time.monotonic()
    if not isinstance(config, RunConfig):
        run_dir = run_dir or RUNS / Path(config).stem
        config = RunConfig.from_yaml(find_space(config), **changes)
    folder = Path(run_dir or RUNS / "search")
    observer = observer or Observer()
    observer.stage("loading model and text")
    first = Plan.make(config, load_plugins(config.plugins))
    _tell(first, observer)
    searched: list[_Part] = []
    with ExitStack() as ledgers:
        for place, share, plan in _parts(first, searched, observer):
            ledger = ledgers.enter_context(
                Ledger.open(folder / place, plan.fingerprint)
            )
            if not searched:
                settings = yaml.safe_dump(config.model_dump(mode="json"))
                write_text(folder / "config.yaml", settings)
            elif plan.reference is not None:
                reference = to_json(plan.reference.to_dict())
                write_text(folder / place / REFERENCE, reference)
            searched.append((place, plan, ledger))
            end = began + share * config.search.budget if config.search.budget else None
            ended = _search_part(plan, ledger, observer, stop, end, rivals=not place)
            if ended == "stopped":
                break
        parts = [_ended(*part) for part in searched]
        rounds = config.search.rounds
        table = _table([ledger.frame() for *_, ledger in searched[:rounds]])
        if ended == "stopped":
            last = parts[:rounds][-1].trials or parts[0].trials
            best_now = best_so_far(last, first.objective)
            return SearchResult(folder, best_now, {}, table, ended)
        observer.stage("choosing among finalists")
        winner, finals = conclude(parts, observer)
        record = winner_record(first, winner, finals)
        write_text(folder / "finals.json", to_json(finals))
        write_text(folder / "policy.json", to_json(record))
        return SearchResult(folder, winner.candidate.policy, finals, table, ended)


def _parts(
    first: Plan, searched: list[_Part], observer: Observer
) -> Iterator[tuple[str, float, Plan]]:
    """Give the searches of a run, each planned when those before it have ended.

    Args:
        first: The plan of the first round.
        searched: The parts so far.
        observer: Hears of each.

    Yields:
        The part's folder in the run folder, the share of the time budget that is spent
        when it ends, and its plan.
    """
    rounds, rivals = first.config.search.rounds, first.config.search.rivals
    last = 0.5 if "random" in rivals else 1.0
    yield "", last / rounds, first
    for number in range(2, rounds + 1):
        yield f"round-{number}", last * number / rounds, _next_round(searched, observer)
    if "random" in rivals:
        observer.note("a rival: random search for as long")
        trials = sum(len(ledger.trials()) for *_, ledger in searched)
        yield RANDOM_RIVAL, 1.0, random_rival(first, trials)


def _ended(place: str, plan: Plan, ledger: Ledger) -> Searched:
    """Give a part with its trials, those of the random search as rivals."""
    rename = as_random_rival if place == RANDOM_RIVAL else list[Trial]
    return Searched(place, plan, rename(ledger.trials()))


def _search_part(
    plan: Plan,
    ledger: Ledger,
    observer: Observer,
    stop: Callable[[], bool] | None,
    deadline: float | None,
    *,
    rivals: bool,
) -> str:
    """Make the variants of a plan and search among them; tell why it ended."""
    observer.stage("making variants")
    start = time.monotonic()
    made = plan.bank.make(plan.pairs, observer.advance)
    if plan.filtered is not None and made:
        saved = plan.filtered.saved_seconds((time.monotonic() - start) / made)
        observer.note(
            f"{plan.filtered.variants} variants left out: {saved:.0f} s saved; by the "
            f"cheap scores the best policy is {plan.filtered.foreseen:.1%} worse for it"
        )
    plan.bench.store.shrink()
    if rivals and not ledger.trials():
        observer.stage("exporting the smallest policy, to be sure")
        preflight(plan, ledger.run_dir)
    observer.stage("measuring the dense model")
    plan.bench.teacher("fitness")
    sensitivities = plan.sensitivities(observer.stage)
    proposals = list(plan.proposals)
    if rivals:
        proposals += solved_rivals(plan, sensitivities, observer.stage)
    frozen = FrozenProblem.of(plan.bench, plan.problem.space, sensitivities)
    frozen.write(ledger.run_dir)
    observer.aim(plan.objective.goals, ledger.trials())
    observer.stage(SEARCHING)
    config = plan.config.search
    ended = run_study(
        plan.problem,
        plan.evaluator(),
        ledger=ledger,
        sampler=plan.strategy,
        objective=plan.objective,
        seed=config.seed,
        rungs=plan.rungs,
        pruner=config.pruner,
        sensitivities=sensitivities,
        trials=config.trials,
        deadline=deadline,
        proposals=proposals,
        on_trial=_on_trial(plan, ledger.run_dir, observer),
        stop=stop,
    )
    ledger.write_tables()
    return ended


def _next_round(searched: list[_Part], observer: Observer) -> Plan:
    """Plan a round around the best policy of the one before."""
    _, plan, ledger = searched[-1]
    incumbent = best_so_far(ledger.trials(), plan.objective)
    if incumbent is None:
        raise RunError(
            f"no trial of round {len(searched)} kept every limit, so there is nothing "
            "to search around. Relax the limits, or give more trials or time"
        )
    observer.note(f"round {len(searched) + 1}: half the step, on new inputs")
    return plan.around(incumbent)


def _table(rounds: list[pd.DataFrame]) -> pd.DataFrame:
    """Give the trials of all rounds as one table."""
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


def _on_trial(plan: Plan, folder: Path, observer: Observer) -> Callable[[Trial], None]:
    def on_trial(trial: Trial) -> None:
        observer.trial(trial)
        observer.advance(trial.number + 1, plan.config.search.trials)
        plan.plugins.notify("trial_finished", trial=trial, run_dir=folder)

    return on_trial
