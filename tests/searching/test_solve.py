"""Another budget is solved for from what a run has measured, in no time."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import config_of, write_text

from autoprune.errors import BudgetError, ConfigError, RunError
from autoprune.limits import Limit
from autoprune.plugins import load_plugins
from autoprune.run import SearchResult, search
from autoprune.searching.budget import Prices
from autoprune.searching.frozen import FrozenProblem
from autoprune.searching.ledger import Ledger
from autoprune.searching.plan import Plan
from autoprune.searching.problem import Problem
from autoprune.searching.refit import fit_multipliers
from autoprune.searching.rows import Trial, utc_now
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.solve import Solution, solve, solve_front

HEADER = 500.0
"""Bytes that no choice changes: the prices of a run leave them to the scale."""

SITES, CHOICES = 5, 4


def limits(**texts: Any) -> dict[str, Limit]:
    return {name: Limit.parse(text) for name, text in texts.items()}


@pytest.fixture
def problem(problem_of: Any) -> Problem:
    made = problem_of(SITES, CHOICES)
    (prices,) = made.prices
    return Problem(made.space, (Prices(prices.metric, prices.table),))


@pytest.fixture
def draws() -> Any:
    return np.random.default_rng(3).uniform(0.1, 1.0, (SITES, CHOICES))


def write_run(
    folder: Path, problem: Problem, *, costs: Any = None, slopes: Any = (), kl: Any = ()
) -> Path:
    """Write what a search leaves: a ledger and a problem.

    Args:
        folder: The run folder.
        problem: Its problem.
        costs: Its sensitivities.
        slopes: Trials with their slopes and curvatures.
        kl: Of trials, with their indices.
    """
    with Ledger.open(folder, {"space": "ab12"}) as ledger:
        for number, (indices, value) in enumerate(kl):
            ledger.add(row_of(problem, number, indices, float(value)))
        for number, (first, second) in slopes:
            first, second = (x.astype(np.float32) for x in (first, second))
            ledger.add_slopes(number, SiteSlopes(first, first * 0, second, (0,)))
    FrozenProblem(problem, {"size_bytes": (20_000.0, 1.0, -HEADER)}, costs).write(
        folder
    )
    return folder


def row_of(problem: Problem, number: int, indices: Any, kl: float) -> Trial:
    policy, now = problem.space.at(np.array(indices)), utc_now()
    return Trial(
        number=number,
        state="complete",
        origin="random",
        policy=policy,
        params=problem.space.params(policy),
        seed=0,
        started=now,
        finished=now,
        values=(kl,),
        metrics={"kl": kl},
    )


def by_hand(problem: Problem, costs: Any, most: float) -> tuple[float, list[int]]:
    """Try every policy."""
    table = [problem.prices[0].table[site.name] for site in problem.space.sites]
    found = []
    for indices in itertools.product(range(CHOICES), repeat=SITES):
        size = HEADER + sum(row[i] for row, i in zip(table, indices, strict=True))
        if size <= most:
            cost = sum(row[i] for row, i in zip(costs, indices, strict=True))
            found.append((float(cost), list(indices)))
    return min(found)


def indices_of(problem: Problem, solution: Solution) -> list[int]:
    return problem.space.index(solution.policy).tolist()


@pytest.mark.parametrize("share", [0.5, 0.65, 0.8])
def test_sensitivities_give_the_best_of_all_policies(
    share: float, problem: Problem, draws: Any, tmp_path: Path
) -> None:
    run = write_run(tmp_path, problem, costs=draws)
    low, high = problem.prices[0].reach(problem.space)
    most = float(round(HEADER + low + share * (high - low)))
    cost, indices = by_hand(problem, draws, most)
    for limit in (most, f"{most / 20_000 * 100:.10f}%"):
        found = solve(run, limits(size_bytes=limit))
        assert indices_of(problem, found) == indices
        assert found.cost == pytest.approx(cost)
        assert found.model == "sensitivities, fitted to the trials"
        total = problem.price("size_bytes", found.policy)
        assert found.metrics == {"size_bytes": total + HEADER}
        assert found.metrics["size_bytes"] <= most


def test_trials_correct_the_sensitivities(
    problem: Problem, draws: Any, tmp_path: Path
) -> None:
    """The first site counts for ten times what its sensitivities say."""
    true = draws * np.array([10, 1, 1, 1, 1])[:, None]
    chosen = np.random.default_rng(5).integers(CHOICES, size=(60, SITES))
    rows = np.arange(SITES)
    trials = [(one, true[rows, one].sum()) for one in chosen]
    run = write_run(tmp_path, problem, costs=draws, kl=trials)
    features = np.stack([draws[rows, one] for one in chosen])
    fitted = fit_multipliers(features, np.array([value for _, value in trials]))
    assert fitted[0] > 5 * fitted[1:].max()
    low, high = problem.prices[0].reach(problem.space)
    most = HEADER + low + 0.5 * (high - low)
    found = indices_of(problem, solve(run, limits(size_bytes=most)))
    assert found == by_hand(problem, true, most)[1]
    assert found != by_hand(problem, draws, most)[1]


def test_choices_without_a_cost_are_not_taken(
    problem: Problem, draws: Any, tmp_path: Path
) -> None:
    draws[:, 0] = np.inf
    run = write_run(tmp_path, problem, costs=draws)
    found = solve(run, limits(size_bytes="100%"))
    assert indices_of(problem, found) == draws.argmin(axis=1).tolist()
    assert np.isfinite(found.cost)


def test_slopes_and_curvatures_at_the_last_incumbent_are_a_model_too(
    problem: Problem, draws: Any, tmp_path: Path
) -> None:
    first, second = draws - 0.5, draws[::-1] / 4
    wrong = (draws[::-1], draws)
    run = write_run(tmp_path, problem, slopes=[(2, wrong), (9, (first, second))])
    low, high = problem.prices[0].reach(problem.space)
    most = HEADER + low + 0.6 * (high - low)
    cost, indices = by_hand(problem, first + second, most)
    found = solve(run, limits(size_bytes=most))
    assert indices_of(problem, found) == indices
    assert found.cost == pytest.approx(cost, rel=1e-5)
    assert found.model == "slopes at trial 9"


def test_the_front_rises_in_size_and_falls_in_cost(
    problem: Problem, draws: Any, tmp_path: Path
) -> None:
    run = write_run(tmp_path, problem, costs=draws)
    points = solve_front(run, "size_bytes", 6)
    assert 2 <= len(points) <= 6
    sizes = [point.metrics["size_bytes"] for point in points]
    costs = [point.cost for point in points]
    assert sizes == sorted(set(sizes))
    assert costs == sorted(set(costs), reverse=True)
    low, _ = problem.prices[0].reach(problem.space)
    assert sizes[0] == low + HEADER
    assert costs[-1] == pytest.approx(draws.min(axis=1).sum())
    for point in points:  # each is the best of its own size
        cost, _ = by_hand(problem, draws, point.metrics["size_bytes"])
        assert point.cost == pytest.approx(cost)


def test_nothing_to_solve_with(problem: Problem, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", problem)
    message = r"has neither sensitivities nor slopes .* \(gradient, allocation, knobs\)"
    for ask in (
        lambda: solve(run, limits(size_bytes="50%")),
        lambda: solve_front(run, "size_bytes", 4),
    ):
        with pytest.raises(RunError, match=message):
            ask()
    with pytest.raises(RunError, match="nowhere is no run folder"):
        solve(tmp_path / "nowhere", limits(size_bytes="50%"))


def test_budgets_that_cannot_be_met_or_understood(
    problem: Problem, draws: Any, tmp_path: Path
) -> None:
    run = write_run(tmp_path, problem, costs=draws)
    with pytest.raises(BudgetError, match="size_bytes <= 501; the best .* reach is"):
        solve(run, limits(size_bytes=HEADER + 1))
    with pytest.raises(ConfigError, match="unknown additive metric 'sise_bytes'"):
        solve(run, limits(sise_bytes="50%"))
    with pytest.raises(ConfigError, match="unknown additive metric 'kl'"):
        solve_front(run, "kl", 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, text: str
) -> Any:
    """Searches by a strategy, once; nobody changes its folder."""
    done: dict[str, SearchResult] = {}

    def run_of(sampler: str) -> SearchResult:
        if sampler not in done:
            settings = {"trials": 10, "finalists": 1, "sampler": sampler}
            config = config_of(tiny_checkpoint, text, search=settings)
            done[sampler] = search(config, tmp_path_factory.mktemp(sampler) / "run")
        return done[sampler]

    return run_of


MODELS = {"gradient": "slopes at trial ", "allocation": "sensitivities, fitted"}


@pytest.mark.parametrize("sampler", MODELS)
def test_a_run_is_solved_for_other_budgets(
    sampler: str, run_of: Any, tiny_checkpoint: Path, text: str
) -> None:
    run = run_of(sampler).run_dir
    start = time.perf_counter()
    small = solve(run, limits(size_bytes="35%"))
    large = solve(run, limits(size_bytes="50%", sparsity=0.1))
    points = solve_front(run, "size_bytes", 5)
    assert time.perf_counter() - start < 10
    assert small.model.startswith(MODELS[sampler])
    dense = run_of(sampler).finals["dense"]["size_bytes"]
    assert small.metrics["size_bytes"] <= 0.35 * dense
    assert large.metrics["size_bytes"] <= 0.5 * dense
    assert large.metrics["sparsity"] >= 0.1
    sizes = [point.metrics["size_bytes"] for point in points]
    costs = [point.cost for point in points]
    assert sizes == sorted(set(sizes)) and costs == sorted(set(costs), reverse=True)
    bench = Plan.make(config_of(tiny_checkpoint, text), load_plugins()).bench
    for one in (small, large, *points):  # what will be written is no larger
        written = bench.exporter.size_bytes(bench.storages(one.policy), bench.untouched)
        assert written <= one.metrics["size_bytes"]


def test_a_run_that_measured_neither_is_refused(run_of: Any) -> None:
    with pytest.raises(RunError, match="neither sensitivities nor slopes to solve wit"):
        solve(run_of("random").run_dir, limits(size_bytes="35%"))
