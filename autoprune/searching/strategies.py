"""What a strategy is: a named maker of Optuna samplers, and what it is told."""

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int
from numpy.random import Generator
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from autoprune.errors import ConfigError, RunError
from autoprune.plugins import Plugins
from autoprune.searching.objective import Objective
from autoprune.searching.problem import Problem
from autoprune.searching.rows import Trial
from autoprune.searching.slopes import SiteSlopes

DEFAULTS = ("gradient", "nsga2")
"""The strategy for one goal within budgets, and that for all else."""


class ExhaustedError(RunError):
    """Every policy of the space within the budgets stands in the study."""


@dataclass(frozen=True, eq=False)
class Brief:
    """All that a proposal may depend on, so that a resumed run proposes the same.

    Attributes:
        seed: Of this trial, derived from the run's and the trial's number.
        objectives: How many values a trial has.
        problem: What may be chosen, its prices and budgets.
        history: The rows of the ledger, in the order of their numbers; values so that
            less is better, whatever the goals.
        pending: Trials that are being measured, as they were begun: elsewhere, at the
            same time. A strategy may take care not to propose the like.
        slopes: By number of a trial, what every choice would change there to first
            order; for those trials at which slopes were taken.
        sensitivities: What every choice costs in KL by itself, ``[sites, choices]``,
            inf where a site has no such choice; None if they were not measured.
        rungs: Windows at which trials are compared, ascending; the last is the whole
            split. A proposal that notes ``rung``, an index of these, is measured so
            far and no further; then it may be one that was measured on fewer windows.
    """

    seed: int
    objectives: int
    problem: Problem
    history: Sequence[Trial] = ()
    pending: Sequence[Trial] = ()
    slopes: Mapping[int, SiteSlopes] = field(default_factory=dict)
    sensitivities: Float[np.ndarray, "sites choices"] | None = None
    rungs: tuple[int, ...] = ()

    def rng(self) -> Generator:
        """Make the generator of this trial: the only source of chance it may use."""
        return np.random.default_rng(self.seed)

    def row(self, number: int) -> Trial:
        """Give the row of a trial that has ended."""
        at = bisect_left(self.history, number, key=lambda trial: trial.number)
        return self.history[at]

    def best(self) -> Trial | None:
        """Give the feasible trial of the least first value, the earliest of equals."""
        found = [trial for trial in self.history if trial.feasible]
        return min(found, key=lambda trial: trial.values[0], default=None)


@dataclass(frozen=True, slots=True)
class SamplerFactory:
    """Makes Optuna samplers of one kind.

    Attributes:
        name: Unique, lower case.
        make: Takes a ``Brief`` and returns a sampler. Called afresh for every trial, so
            a sampler keeps what it remembers in the study, not in itself; Optuna's own
            do.
        help: What it is good for, in one line.
        changes: At most so many sites of a proposal are taken, drawn at random, on top
            of a good policy of the study. None takes whole proposals. A sampler that
            draws every site anew meets nothing better at hundreds of sites, however
            good its draws.
        needs: What has to be measured for it: ``sensitivities`` before the first trial,
            ``slopes`` at every incumbent.
        several: Whether it serves several objectives.
        slope_tokens: Tokens that the gradient at the first incumbent is taken on.
        slope_growth: Factor on them from one incumbent to the next: the first steps are
            large, and few tokens show the way; later ones are told from noise by more.
        most_slope_tokens: Where that growth ends.
        draws: How often labels are drawn there for the curvature; 0 for none.
        drawn_tokens: On so many of those tokens.
    """

    name: str
    make: Callable[[Brief], BaseSampler]
    help: str = ""
    changes: int | None = None
    needs: frozenset[str] = frozenset()
    several: bool = True
    slope_tokens: int = 1024
    slope_growth: float = 1.5
    most_slope_tokens: int = 2048
    draws: int = 1
    drawn_tokens: int = 1024

    def tokens_at(self, turn: int) -> int:
        """Give the tokens of a gradient, by how many were taken before."""
        grown = self.slope_tokens * self.slope_growth**turn
        return round(min(grown, max(self.slope_tokens, self.most_slope_tokens)))


class PolicySampler(BaseSampler):
    """The base of strategies that propose whole policies from the ledger's rows.

    A subclass finishes ``propose``. What it notes beside a proposal stands in the row
    as ``Trial.system_attrs``, under the names of its own choice.
    """

    NOTES: ClassVar[str] = "note:"

    def __init__(self, brief: Brief) -> None:
        self.brief = brief
        self.problem = brief.problem
        self.space = brief.problem.space

    @abstractmethod
    def propose(self) -> tuple[Int[np.ndarray, " sites"], Mapping[str, Any]]:
        """Give the position of each site's choice, and what to note in the row.

        A proposal that is over a budget is moved on to it, one that was measured
        before is changed a little, so neither is an error.

        Raises:
            ExhaustedError: If there is nothing left to try.
        """

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Take all sites together; see Optuna."""
        return {}

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Give the proposal as Optuna's parameters."""
        indices, notes = self.propose()
        for name, value in notes.items():
            study._storage.set_trial_system_attr(
                trial._trial_id, self.NOTES + name, value
            )
        return dict(self.space.params(self.space.at(indices)))

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Never needed: ``sample_relative`` gives every site."""
        raise AssertionError(f"{param_name} was not proposed")


def notes_of(trial: Trial) -> dict[str, Any]:
    """Read what a ``PolicySampler`` noted beside the proposal of a trial."""
    mark = PolicySampler.NOTES
    attrs = trial.system_attrs.items()
    return {n.removeprefix(mark): v for n, v in attrs if n.startswith(mark)}


def strategy_of(
    name: str | None, plugins: Plugins, objective: Objective, problem: Problem
) -> SamplerFactory:
    """Look up a strategy; None for the default.

    Raises:
        ConfigError: If it does not serve such an objective.
    """
    if name is None:
        fits = objective.goals == (("kl", "minimize"),) and problem.budgets
        name = DEFAULTS[0] if fits else DEFAULTS[1]
    factory: SamplerFactory = plugins.get("samplers", name)
    if not factory.several and not objective.single:
        goals = " and ".join(goal for goal, _ in objective.goals)
        known = plugins.objects["samplers"].values()
        others = ", ".join(sorted(one.name for one in known if one.several))
        raise ConfigError(
            f"strategy {name!r} serves one goal, found {goals}. Name one goal and "
            f"limit the other by a budget, or take one of {others}"
        )
    if factory.needs and not problem.budgets:
        raise ConfigError(
            f"strategy {name!r} solves for the best policy within budgets, and there "
            "is none. Give one under objective, such as budgets: {size_bytes: 40%}"
        )
    return factory
