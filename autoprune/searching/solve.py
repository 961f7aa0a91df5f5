"""Solves a run's problem for another budget, from what was measured already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import RunError
from autoprune.limits import Limit
from autoprune.policy import Policy
from autoprune.searching.allocation import allocate, front
from autoprune.searching.frozen import FrozenProblem
from autoprune.searching.ledger import Ledger
from autoprune.searching.problem import Problem
from autoprune.searching.refit import fit_multipliers
from autoprune.searching.rows import Trial
from autoprune.searching.runs import times_basis
from autoprune.searching.slopes import SiteSlopes

Costs = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Solution:
    """A policy for another budget, that was not measured.

    Attributes:
        policy: The policy.
        metrics: Its additive metrics; bytes to the few that a header may take.
        cost: What the additive model says of its KL; good for comparing solutions.
        model: What the model is made of.
    """

    policy: Policy
    metrics: Mapping[str, float]
    cost: float
    model: str


def solve(run_dir: Path, limits: Mapping[str, Limit]) -> Solution:
    """Find the policy that is best within other budgets, without measuring.

    The model is additive: the sensitivities of the run, with multipliers fitted to its
    trials; where it has none, the slopes and curvatures at its last incumbent, which
    hold near to that. A policy far from all that was measured is a guess: measure it
    with ``autoprune evaluate``.

    Args:
        run_dir: The run folder.
        limits: At least one budget.

    Raises:
        RunError: If the run has nothing to solve with.
        ConfigError: If a metric is unknown.
        BudgetError: If no policy of the space is within the budgets.
    """
    frozen, costs, model = _model(run_dir)
    problem = frozen.within(limits)
    return _solution(frozen, problem, costs, allocate(problem, costs), model)


def solve_front(run_dir: Path, metric: str, count: int) -> list[Solution]:
    """Find the whole front of KL against an additive metric, without measuring.

    Raises:
        RunError: If the run has nothing to solve with.
        ConfigError: If the metric is unknown.
    """
    frozen, costs, model = _model(run_dir)
    points = front(frozen.problem, costs, metric, count=count)
    return [
        _solution(frozen, frozen.problem, costs, point.indices, model)
        for point in points
    ]


def _model(run_dir: Path) -> tuple[FrozenProblem, Costs, str]:
    with Ledger.read(run_dir) as ledger:
        trials, slopes = ledger.trials(), ledger.slopes()
        basis = times_basis(ledger.fingerprint)
    times = f"; times from {basis}" if basis else ""
    frozen = FrozenProblem.read(run_dir)
    if frozen.costs is not None:
        costs = np.maximum(frozen.costs, 0) * _multipliers(frozen, trials)[:, None]
        return frozen, costs, f"sensitivities, fitted to the trials{times}"
    if slopes:
        number = max(slopes)
        return frozen, _prices_at(slopes[number]), f"slopes at trial {number}{times}"
    raise RunError(
        f"{run_dir} has neither sensitivities nor slopes to solve with. Search with a "
        "strategy that measures them (gradient, allocation, knobs), or longer: rivals "
        "are tried first"
    )


def _prices_at(slopes: SiteSlopes) -> Costs:
    costs: Costs = slopes.slope.astype(np.float64) + slopes.curvature
    return costs


def _multipliers(frozen: FrozenProblem, trials: Sequence[Trial]) -> Costs:
    good = [trial for trial in trials if trial.state == "complete"]
    costs = frozen.costs
    assert costs is not None
    if len(good) < 3 or any("kl" not in trial.metrics for trial in good):
        return np.ones(len(costs))
    rows = np.arange(len(costs))
    features = np.stack(
        [costs[rows, frozen.problem.space.index(trial.policy)] for trial in good]
    )
    values = np.array([trial.metrics["kl"] for trial in good])
    return fit_multipliers(np.maximum(features, 0), values)


def _solution(
    frozen: FrozenProblem,
    problem: Problem,
    costs: Costs,
    indices: NDArray[np.int64],
    model: str,
) -> Solution:
    policy = problem.space.at(indices)
    metrics = {
        name: frozen.value(name, problem.price(name, policy)) for name in frozen.scales
    }
    cost = float(costs[np.arange(len(indices)), indices].sum())
    return Solution(policy, metrics, cost, model)
