"""The whole path: a configuration in, a run folder with the best policy out."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from autoprune.config import RunConfig
from autoprune.errors import ConfigError, RunError, unknown_name
from autoprune.evaluation.provenance import made_for, measured_on
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import load_plugins
from autoprune.policy import Policy
from autoprune.reporting.machine import to_json
from autoprune.reporting.observer import SEARCHING, Observer
from autoprune.searching.finals import (
    RIVAL,
    Finalist,
    best_so_far,
    rank,
    report,
    resolve_anew,
    take_candidates,
)
from autoprune.searching.ledger import Ledger
from autoprune.searching.plan import Plan
from autoprune.searching.rows import Trial
from autoprune.searching.study import run_study
from autoprune.searching.trial import Evaluator

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
    plan = Plan.make(config, load_plugins(config.plugins))
    _tell(plan, observer)
    with Ledger.open(folder, plan.fingerprint) as ledger:
        write_text(
            folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"))
        )
        observer.stage("making variants")
        plan.bank.make(plan.pairs, observer.advance)
        plan.bench.store.shrink()
        observer.stage("measuring the dense model")
        plan.bench.teacher("fitness")
        observer.aim(plan.objective.goals, ledger.trials())
        observer.stage(SEARCHING)
        budget = config.search.budget
        ended = run_study(
            plan.problem,
            Evaluator(plan.bench, plan.bank, reward=plan.reward),
            ledger=ledger,
            sampler=plan.plugins.get("samplers", config.search.sampler),
            objective=plan.objective,
            seed=config.search.seed,
            trials=config.search.trials,
            deadline=None if budget is None else began + budget,
            proposals=plan.proposals,
            on_trial=_on_trial(plan, folder, observer),
            stop=stop,
        )
        ledger.write_tables()
        if ended == "stopped":
            best_now = best_so_far(ledger.trials(), plan.objective)
            return SearchResult(folder, best_now, {}, ledger.frame(), ended)
        observer.stage("choosing among finalists")
        winner, finals = _conclude(plan, ledger.trials(), observer)
        record = _record(plan, winner, finals)
        write_text(folder / "finals.json", to_json(finals))
        write_text(folder / "policy.json", to_json(record))
        best = winner.candidate.policy
        return SearchResult(folder, best, finals, ledger.frame(), ended)


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
    for note in plan.bench.inventory.notes:
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


def _conclude(
    plan: Plan, trials: list[Trial], observer: Observer
) -> tuple[Finalist, dict[str, Any]]:
    """Choose on text the search never saw; report on text that nothing ever saw."""
    if not trials:
        raise RunError(
            f"the time budget of {plan.config.search.budget:g} s ended before the "
            "first trial. Give more; the variants are kept, not made again"
        )
    candidates = take_candidates(
        trials, plan.objective, count=plan.config.search.finalists
    )
    cost = plan.cost("choice")
    ranked = rank(plan.bench, plan.bank, candidates, cost)
    rivals = [f for f in ranked if f.candidate.origin.startswith(RIVAL)]
    contenders = [ranked[0], *(rivals[:1] if ranked[0] not in rivals else [])]
    resolved = []
    for finalist in contenders:
        observer.stage(f"solving trial {finalist.candidate.trial} on its own inputs")
        resolved.append(resolve_anew(plan.bench, finalist, cost, observer.advance))
    winner = min(resolved, key=lambda finalist: cost(finalist.choice))
    observer.stage("measuring on the report split")
    reports = [
        report(plan.bench, finalist)
        | {"sizes": _sizes(plan.bench, finalist.candidate.policy)}
        for finalist in resolved
    ]
    return winner, {
        "dense": plan.bench.dense_metrics("report"),
        "dense_sizes": _sizes(plan.bench, plan.bench.dense_policy()),
        "winner": reports[resolved.index(winner)],
        "rivals": [
            row
            for row, finalist in zip(reports, resolved, strict=True)
            if finalist.candidate.origin.startswith(RIVAL)
        ],
        "finalists": [
            {
                "trial": finalist.candidate.trial,
                "origin": finalist.candidate.origin,
                "choice": finalist.choice.metrics,
            }
            for finalist in ranked
        ],
    }


def _sizes(bench: Workbench, policy: Policy) -> dict[str, int]:
    """Tell the bytes of a policy in every export target, the run's own first."""
    storages = bench.storages(policy)
    exporters = {bench.exporter.name: bench.exporter, **bench.exporters}
    return {
        name: exporter.size_bytes(storages, bench.untouched)
        for name, exporter in exporters.items()
    }


def _record(plan: Plan, winner: Finalist, finals: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the winner so that it can be exported and applied again."""
    return (
        winner.candidate.policy.to_dict()
        | made_for(plan.bench, winner.reference or plan.reference)
        | {
            "trial": winner.candidate.trial,
            "seed": plan.config.search.seed,
            "text": measured_on(plan.bench, plan.config.text, "report"),
            "figures": {
                "dense": finals["dense"],
                "compressed": finals["winner"]["report"],
            },
            "rivals": [{"name": r["origin"], **r["report"]} for r in finals["rivals"]],
        }
    )


def write_text(path: Path, text: str) -> None:
    """Write a file of a run folder whole, or not at all.

    Raises:
        RunError: If it cannot be written, as on a full disk.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
