import json

import numpy as np
import optuna
import pytest

from autoprune.searching.budget import Budget
from autoprune.searching.problem import Problem
from autoprune.searching.rows import Trial
from autoprune.searching.samplers import BudgetedSampler
from autoprune.searching.strategies import (
    Brief,
    ExhaustedError,
    PolicySampler,
    SamplerFactory,
    notes_of,
)

NOTES = {"generation": 3, "from": None, "parts": [0.5, 2], "text": "a: b", "rung": 0}


class Given(PolicySampler):
    """Proposes what a test wants."""

    wanted = None
    notes = NOTES

    def propose(self):
        return self.wanted, self.notes


def sampler_of(wanted, notes=NOTES):
    kind = type("Fixed", (Given,), {"wanted": wanted, "notes": notes})
    return SamplerFactory("given", kind)


def study_of(problem, factory, **brief):
    brief = Brief(**{"seed": 0, "objectives": 1, "problem": problem, **brief})
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.InMemoryStorage()
    sampler = BudgetedSampler(brief, factory)
    return optuna.create_study(storage=storage, sampler=sampler), sampler


def ask(study, problem):
    asked = study.ask(problem.space.distributions())
    return asked, problem.space.index(problem.space.policy(asked.params))


def row(problem, indices, number=0, value=1.0, **fields):
    policy = problem.space.at(np.array(indices))
    fields = {"state": "complete", "system_attrs": {}, **fields}
    params = problem.space.params(policy)
    return Trial(
        number=number,
        origin="test",
        policy=policy,
        params=params,
        seed=0,
        started="",
        finished="",
        values=(value,),
        **fields,
    )


def test_notes_come_back_from_the_row(problem_of):
    problem = problem_of(4, 3)
    study, _ = study_of(problem, sampler_of(np.array([0, 1, 2, 1])))
    ask(study, problem)
    attrs = study.get_trials(deepcopy=False)[0].system_attrs
    stored = json.loads(json.dumps({**attrs, "completed_rung_0": 3.5}))
    assert notes_of(row(problem, [0, 1, 2, 1], system_attrs=stored)) == NOTES
    assert notes_of(row(problem, [0, 1, 2, 1])) == {}


def test_best_is_the_earliest_of_the_least_that_are_feasible(problem_of):
    problem = problem_of(2, 4)
    rows = [
        row(problem, [0, 0], 0, 5.0),
        row(problem, [0, 1], 1, 1.0, state="pruned"),
        row(problem, [0, 2], 2, 1.0, state="diverged"),
        row(problem, [0, 3], 3, 1.0, constraints={"latency_ms": 0.1}),
        row(problem, [1, 0], 4, 3.0, constraints={"latency_ms": 0.0}),
        row(problem, [1, 1], 5, 3.0),
        row(problem, [1, 2], 6, 4.0),
    ]
    assert Brief(0, 1, problem, rows).best() is rows[4]
    assert Brief(0, 1, problem, rows[1:4]).best() is None
    assert Brief(0, 1, problem).best() is None


def test_brief_gives_one_stream_of_chance(problem_of):
    one, other = (Brief(seed, 1, problem_of(2, 2)) for seed in (7, 8))
    assert one.rng().integers(1 << 60) == one.rng().integers(1 << 60)
    assert one.rng().integers(1 << 60) != other.rng().integers(1 << 60)


def test_proposal_within_the_budgets_is_left_alone(problem_of):
    problem = problem_of(12, 6, budget=0.5)
    wanted = problem.projection.cheapest.copy()
    wanted[3] -= 1  # far below the budget, which nothing fills up
    study, _ = study_of(problem, sampler_of(wanted))
    _, found = ask(study, problem)
    np.testing.assert_array_equal(found, wanted)
    assert problem.price("size_bytes", problem.space.at(found)) < (
        0.9 * problem.budgets[0].limit
    )


def test_proposal_of_just_the_budget_is_left_alone(problem_of):
    problem = problem_of(12, 6, budget=0.5)
    wanted = problem.projection.fit(np.zeros(12, dtype=int), np.random.default_rng(0))
    price = problem.price("size_bytes", problem.space.at(wanted))
    exact = Problem(problem.space, problem.prices, (Budget("size_bytes", price),))
    study, _ = study_of(exact, sampler_of(wanted))
    np.testing.assert_array_equal(ask(study, exact)[1], wanted)


def test_proposal_over_the_budget_is_moved_on_to_it(problem_of):
    problem = problem_of(12, 6, budget=0.5)
    study, _ = study_of(problem, sampler_of(np.zeros(12, dtype=int)))
    asked, found = ask(study, problem)
    limit = problem.budgets[0].limit
    price = problem.price("size_bytes", problem.space.at(found))
    assert 0.998 * limit <= price <= limit
    assert asked.study.get_trials()[0].system_attrs["note:generation"] == 3


def test_proposal_without_budgets_is_left_alone(problem_of):
    problem = problem_of(5, 4)
    study, _ = study_of(problem, sampler_of(np.array([3, 0, 2, 1, 3])))
    assert ask(study, problem)[1].tolist() == [3, 0, 2, 1, 3]


@pytest.mark.parametrize("budget", [None, 0.5])
def test_proposal_that_is_known_is_changed_a_little(problem_of, budget):
    problem = problem_of(12, 6, budget=budget)
    wanted = np.full(12, 2)
    if problem.projection:
        wanted = problem.projection.fit(wanted, np.random.default_rng(0))
    study, _ = study_of(problem, sampler_of(wanted))
    found = [ask(study, problem)[1] for _ in range(3)]
    np.testing.assert_array_equal(found[0], wanted)
    assert len({one.tobytes() for one in found}) == 3
    assert all(0 < (one != wanted).sum() <= 6 for one in found[1:])


@pytest.mark.parametrize("rung", [1, 2, -1])
def test_known_proposal_for_another_rung_is_left_alone(problem_of, rung):
    problem = problem_of(12, 6, budget=0.5)
    wanted = problem.projection.fit(np.full(12, 2), np.random.default_rng(0))
    study, _ = study_of(problem, sampler_of(wanted, {"rung": rung}))
    for _ in range(2):
        np.testing.assert_array_equal(ask(study, problem)[1], wanted)


def test_given_policy_has_no_notes_of_another(problem_of):
    problem = problem_of(4, 3)
    study, sampler = study_of(problem, sampler_of(np.array([0, 1, 2, 1])))
    sampler.give(problem.space.params(problem.space.at(np.array([2, 2, 2, 2]))))
    assert ask(study, problem)[1].tolist() == [2, 2, 2, 2]
    assert study.get_trials()[0].system_attrs == {}
    assert ask(study, problem)[1].tolist() == [0, 1, 2, 1]


def test_exhausted_strategy_is_heard(problem_of):
    class Done(PolicySampler):
        def propose(self):
            raise ExhaustedError("nothing left")

    problem = problem_of(4, 3)
    study, _ = study_of(problem, SamplerFactory("done", Done))
    with pytest.raises(ExhaustedError, match="nothing left"):
        ask(study, problem)
