"""How a run stands, read from its folder, also while it goes on."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoprune.errors import RunError
from autoprune.evaluation.timed import latency_metric_names
from autoprune.plugins import load_plugins
from autoprune.searching.formulate import front_goals, goals_of
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Direction, Objective, front_in
from autoprune.searching.rows import Trial
from autoprune.searching.runs import (
    FINALS,
    parts_in,
    read_config,
    read_trials,
    times_basis,
)

SHOWN = 5
"""Best trials that are told of where one metric decides."""


@dataclass(frozen=True, eq=False)
class RunStatus:
    """How a run stands.

    Attributes:
        run_dir: The run folder.
        goals: The metrics wanted, each with its direction.
        trials: All trials.
        best: The best trials where one metric is wanted, the best first; else none.
        front: Trials that no other beats in what is wanted; where that is one metric,
            in size and divergence.
        wanted: Trials that the run shall have; None if time alone ends it.
        finals: The last choice, as in ``finals.json``; empty before it is made.
        times: What predicted times come from; None if the run has none.
        further: Of every further part of the run, such as ``round-2``: its best trials,
            and how many it has.
    """

    run_dir: Path
    goals: tuple[tuple[str, Direction], ...]
    trials: Sequence[Trial]
    best: Sequence[Trial]
    front: Sequence[Trial]
    wanted: int | None
    finals: Mapping[str, Any]
    further: Mapping[str, tuple[Sequence[Trial], int]] = field(default_factory=dict)
    times: str | None = None

    @classmethod
    def read(cls, run_dir: Path) -> "RunStatus":
        """Read a run folder.

        Raises:
            RunError: If it is no run folder, or a file in it cannot be read.
            ConfigError: If its configuration cannot be read.
            PluginError: If one of its plugins is not there.
        """
        trials = read_trials(run_dir)
        config = read_config(run_dir)
        metrics = load_plugins(config.plugins).objects["metrics"]
        directions = {name: metric.direction for name, metric in metrics.items()}
        directions |= dict.fromkeys(latency_metric_names(config.latency), "minimize")
        goals = goals_of(directions, config.objective)
        further = {name: read_trials(run_dir / name) for name in parts_in(run_dir)}
        return cls(
            run_dir,
            goals,
            trials,
            _best(trials, goals),
            front_in(trials, front_goals(goals)),
            config.search.trials,
            _finals(run_dir / FINALS),
            {name: (_best(rows, goals), len(rows)) for name, rows in further.items()},
            _times(run_dir),
        )

    @property
    def mean_trial_s(self) -> float | None:
        """Mean seconds of a trial; None without any."""
        times = [math.fsum(trial.timings.values()) for trial in self.trials]
        return math.fsum(times) / len(times) if times else None

    @property
    def left_s(self) -> float | None:
        """Seconds that the trials still wanted take at that pace; None if unknown."""
        if self.wanted is None or self.mean_trial_s is None:
            return None
        return max(0, self.wanted - len(self.trials)) * self.mean_trial_s

    def states(self) -> dict[str, int]:
        """Count the trials by how they ended."""
        ends = [trial.state for trial in self.trials]
        return {state: ends.count(state) for state in dict.fromkeys(ends)}

    def to_dict(self) -> dict[str, Any]:
        """Give the status as plain data, ready for JSON."""
        return {
            "run": str(self.run_dir),
            "goals": dict(self.goals),
            "trials": len(self.trials),
            "trials_wanted": self.wanted,
            "states": self.states(),
            "mean_trial_s": self.mean_trial_s,
            "left_s": self.left_s,
            "last_finished": self.trials[-1].finished if self.trials else None,
            "best": [_trial(trial) for trial in self.best],
            "front": [_trial(trial) for trial in self.front],
            "parts": {
                name: {"trials": count, "best": [_trial(trial) for trial in best]}
                for name, (best, count) in self.further.items()
            },
            "finals": dict(self.finals),
        }


def _best(
    trials: Sequence[Trial], goals: tuple[tuple[str, Direction], ...]
) -> list[Trial]:
    """Give the best trials where one metric is wanted; else none."""
    if len(goals) > 1:
        return []
    feasible = [trial for trial in trials if trial.feasible]
    return sorted(feasible, key=Objective(goals).costs)[:SHOWN]


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "origin": trial.origin,
        "metrics": dict(trial.metrics),
        "policy": trial.policy.to_dict(),
    }


def _finals(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read {path}: {error}. Run the search again; its trials are kept"
        ) from error


def _times(run_dir: Path) -> str | None:
    with Ledger.read(run_dir) as ledger:
        return times_basis(ledger.fingerprint)
