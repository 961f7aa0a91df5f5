"""Studies over several workers: whatever the order in which their jobs end."""

import numpy as np
import optuna
import pytest
from autoprune_plugins.evolution import register_samplers as evolution
from autoprune_plugins.gradient import register_samplers as gradient
from toy_evaluators import ShuffledCrew, SmoothEvaluator

from autoprune.policy import Policy
from autoprune.searching.ends import Ends
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Objective, best
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.strategies import SamplerFactory, notes_of
from autoprune.searching.study import DEATHS, TRIES, run_study

KL = Objective((("kl", "minimize"),))
RANDOM = SamplerFactory(
    "random", lambda brief: optuna.samplers.RandomSampler(seed=brief.seed)
)
NSGA2 = SamplerFactory(
    "nsga2",
    lambda brief: optuna.samplers.NSGAIISampler(population_size=4, seed=brief.seed),
)
(EVOLUTION,), (GRADIENT,) = evolution(), gradient()
every_sampler = pytest.mark.parametrize(
    "sampler", [RANDOM, NSGA2, EVOLUTION, GRADIENT], ids=lambda one: one.name
)


def uniform(problem):
    actions = problem.space.choices[problem.space.sites[0].name]
    policies = [Policy.uniform(problem.space.sites, action) for action in actions]
    return next(policy for policy in policies if problem.within(policy))


def search(run_dir, problem, crew, *, trials, sampler, on_trial=None):
    with Ledger.open(run_dir, {}) as ledger:
        reason = run_study(
            problem,
            crew,
            ledger=ledger,
            sampler=sampler,
            objective=KL,
            seed=0,
            proposals=[("uniform", uniform(problem))],
            ends=Ends(trials),
            on_trial=on_trial,
        )
        return reason, ledger.trials(), ledger.running(), ledger.slopes()


@every_sampler
@pytest.mark.parametrize("workers", [2, 7])
def test_every_trial_ends_once_and_no_policy_comes_twice(
    tmp_path, problem_of, sampler, workers
):
    problem = problem_of(24, 8, budget=0.5)
    crew = ShuffledCrew(SmoothEvaluator(problem), workers)
    reason, rows, running, _ = search(
        tmp_path, problem, crew, trials=30, sampler=sampler
    )
    # The gradient may find nothing more to gain before.
    assert reason == "trials" or sampler is GRADIENT and len(rows) > 12
    assert [row.number for row in rows] == list(range(len(rows))) and running == []
    assert len({row.policy for row in rows}) == len(rows)
    assert {row.state for row in rows} == {"complete"}
    assert crew.most == workers


def test_gradient_finds_as_much_with_workers(tmp_path, problem_of):
    problem = problem_of(24, 8, budget=0.5)
    found = {}
    for workers in (1, 4):
        crew = ShuffledCrew(SmoothEvaluator(problem), workers)
        _, rows, _, slopes = search(
            tmp_path / str(workers), problem, crew, trials=40, sampler=GRADIENT
        )
        found[workers] = best(rows, KL).values[0] / rows[0].values[0]
        assert len(slopes) > 1
    assert found[4] < max(0.6, 1.15 * found[1])


def test_search_ends_when_nothing_is_left_and_loses_no_number(tmp_path, problem_of):
    problem = problem_of(2, 4)
    crew = ShuffledCrew(SmoothEvaluator(problem), 5)
    reason, rows, running, _ = search(
        tmp_path, problem, crew, trials=99, sampler=RANDOM
    )
    assert (reason, running) == ("exhausted", [])
    assert [row.number for row in rows] == list(range(16))


@every_sampler
def test_lost_workers_cost_no_trial(tmp_path, problem_of, sampler):
    problem = problem_of(24, 8, budget=0.5)
    crew = ShuffledCrew(SmoothEvaluator(problem), 3, lost=0.2)
    _, rows, running, _ = search(tmp_path, problem, crew, trials=40, sampler=sampler)
    assert [row.number for row in rows] == list(range(len(rows))) and running == []
    assert len(rows) == 40 or sampler is GRADIENT
    failed = [row for row in rows if row.state == "failed"]
    assert {row.attempts for row in failed} <= {DEATHS}
    again = [row for row in rows if row.attempts > 1 and row not in failed]
    assert again and {row.state for row in again} == {"complete"}


@every_sampler
def test_killed_driver_finds_its_orphans(tmp_path, problem_of, sampler):
    problem = problem_of(24, 8, budget=0.5)

    def die(trial):
        if trial.number >= 9:
            raise KeyboardInterrupt

    crew = ShuffledCrew(SmoothEvaluator(problem), 4)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, problem, crew, trials=25, sampler=sampler, on_trial=die)
    with Ledger.read(tmp_path) as ledger:
        orphans, done = ledger.running(), ledger.trials()
    assert 1 <= len(orphans) <= 3
    crew = ShuffledCrew(SmoothEvaluator(problem), 4, seed=1)
    _, rows, running, _ = search(tmp_path, problem, crew, trials=25, sampler=sampler)
    assert [row.number for row in rows] == list(range(len(rows))) and running == []
    assert len(rows) > 12
    by_number = {row.number: row for row in rows}
    for orphan in orphans:
        row = by_number[orphan.number]
        assert (row.policy, row.attempts) == (orphan.policy, 2)
        assert notes_of(row) == notes_of(orphan)
    assert all(vars(by_number[row.number]) == vars(row) for row in done)


def test_trial_that_kills_its_driver_is_given_up(tmp_path, problem_of):
    problem = problem_of(6, 4)
    deadly = uniform(problem)

    class Deadly(SmoothEvaluator):
        def measure(self, policy, windows=None, *, near=None):
            if policy == deadly:
                raise KeyboardInterrupt  # as if the process were gone
            return super().measure(policy, windows, near=near)

    for _ in range(TRIES):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path, problem, Deadly(problem), trials=5, sampler=RANDOM)
    _, rows, running, _ = search(
        tmp_path, problem, Deadly(problem), trials=5, sampler=RANDOM
    )
    assert len(rows) == 5 and running == []
    assert (rows[0].state, rows[0].attempts) == ("failed", TRIES)
    assert f"died each of the {TRIES} times" in rows[0].error


def test_pooled_slopes_are_those_of_all_windows_at_once():
    rng = np.random.default_rng(0)
    each = rng.normal(size=(6, 3, 4)).astype(np.float32)

    def of(windows):
        some = each[list(windows)]
        error = some.std(0) / len(some) ** 0.5
        return SiteSlopes(some.mean(0), error, np.abs(some).mean(0), tuple(windows))

    whole = of(range(6))
    parts = SiteSlopes.pooled([of([0, 1, 2]), of([3]), of([4, 5])])
    assert parts.windows == whole.windows
    np.testing.assert_allclose(parts.slope, whole.slope, atol=1e-6)
    np.testing.assert_allclose(parts.error, whole.error, atol=1e-6)
    np.testing.assert_allclose(parts.curvature, whole.curvature, atol=1e-6)
    assert SiteSlopes.pooled([whole]) is whole
