"""What a search is after, and which trials come closest to it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from autoprune.errors import ConfigError, unknown_name
from autoprune.searching.rows import Trial

Direction = Literal["minimize", "maximize"]

Measurement = Mapping[str, float]
"""The metric values of a policy."""

WORST = 1e6
"""Told of a trial without a finite value while there is nothing to compare it with."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound on a metric that is known only once it is measured.

    Attributes:
        metric: Its name.
        value: The bound, itself allowed.
        direction: ``minimize`` for an upper bound, ``maximize`` for a lower one.
    """

    metric: str
    value: float
    direction: Direction = "minimize"

    def excess(self, measurement: Measurement) -> float:
        """Tell how far a measurement is beyond the bound, as a share of it."""
        over = measurement[self.metric] - self.value
        signed = over if self.direction == "minimize" else -over
        share = signed / (abs(self.value) or 1)
        return share if math.isfinite(share) else WORST


@dataclass(frozen=True, slots=True)
class Objective:
    """What a search is after: one metric, a reward, or a front of several metrics.

    Attributes:
        goals: Metric and direction of each; a reward is the metric ``reward``.
        limits: Bounds that a policy has to keep besides the budgets.
    """

    goals: tuple[tuple[str, Direction], ...]
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.goals]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"an objective takes metrics, each once; found {names}")

    @property
    def directions(self) -> list[Direction]:
        """The direction of every goal, as Optuna spells it."""
        return [direction for _, direction in self.goals]

    @property
    def single(self) -> bool:
        """True if there is one goal, so that one trial can be the best."""
        return len(self.goals) == 1

    def values(self, measurement: Measurement) -> tuple[float, ...]:
        """Take the goals' values out of a measurement.

        Raises:
            ConfigError: If a goal or a limit is not among the metrics.
        """
        for name in [name for name, _ in self.goals] + [x.metric for x in self.limits]:
            if name not in measurement:
                raise ConfigError(unknown_name("metric", name, measurement))
        return tuple(float(measurement[name]) for name, _ in self.goals)

    def minimised(self, trial: Trial) -> Trial:
        """Give a trial with its values so that less is better in each."""
        if all(way == "minimize" for way in self.directions) or not trial.values:
            return trial
        return replace(trial, values=self.costs(trial))

    def costs(self, trial: Trial) -> tuple[float, ...]:
        """Give the values of a trial so that less is better in each."""
        pairs = zip(self.goals, trial.values, strict=True)
        return tuple(v if way == "minimize" else -v for (_, way), v in pairs)


def best(trials: Sequence[Trial], objective: Objective) -> Trial | None:
    """Find the best feasible trial, the earliest of equals; None if there is none.

    Raises:
        ConfigError: If the objective has several goals; ``front`` is for those.
    """
    if len(objective.goals) > 1:
        names = ", ".join(name for name, _ in objective.goals)
        raise ConfigError(f"no one trial is best in {names}; ask for the front")
    feasible = [trial for trial in trials if trial.feasible]
    return min(feasible, key=objective.costs, default=None)


def front(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    """Find the feasible trials that no other beats, sorted by the first goal.

    Of trials with equal values the earliest stands for all.
    """
    feasible = [trial for trial in trials if trial.feasible]
    feasible.sort(key=lambda trial: (objective.costs(trial), trial.number))
    costs = np.array([objective.costs(trial) for trial in feasible])
    # Sorted, a trial can only be beaten or equalled by one before it.
    return [
        trial
        for i, trial in enumerate(feasible)
        if not (costs[:i] <= costs[i]).all(axis=1).any()
    ]


def front_in(
    trials: Sequence[Trial], goals: tuple[tuple[str, Direction], ...]
) -> list[Trial]:
    """Find the feasible trials that no other beats in some metrics; see ``front``."""
    named = [
        replace(trial, values=tuple(trial.metrics[name] for name, _ in goals))
        for trial in trials
        if trial.feasible
    ]
    by_number = {trial.number: trial for trial in trials}
    return [by_number[trial.number] for trial in front(named, Objective(goals))]
