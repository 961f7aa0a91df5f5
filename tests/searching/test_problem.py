import pytest

from autoprune.errors import BudgetError, ConfigError
from autoprune.policy import Action, Policy
from autoprune.searching.projection import SLACK


def uniform(problem, sparsity):
    action = Action.parse(f"wanda(sparsity={sparsity})")
    return Policy.uniform(problem.space.sites, action)


def test_price_is_the_constant_and_the_sum_over_sites(problem_of):
    problem = problem_of(3, 4)
    table = problem.prices[0].table
    expected = 500 + sum(prices[2] for prices in table.values())
    assert problem.price("size_bytes", uniform(problem, 0.3)) == expected


def test_price_of_an_unknown_metric_is_an_error(problem_of):
    problem = problem_of(3, 4)
    with pytest.raises(ConfigError, match="unknown additive metric 'kl'"):
        problem.price("kl", uniform(problem, 0.3))


def test_within_compares_with_every_budget(problem_of):
    problem = problem_of(20, 9, budget=0.5)
    assert problem.within(uniform(problem, 0.9))
    assert not problem.within(uniform(problem, 0.1))
    assert problem_of(20, 9).within(uniform(problem, 0.1))


def test_without_budgets_nothing_is_moved(problem_of):
    assert problem_of(3, 4).projection is None


def test_between_mixes_two_policies_just_under_the_budget(problem_of):
    problem = problem_of(60, 9, budget=0.5)
    low, high = uniform(problem, 0.9), uniform(problem, 0.2)
    mix = problem.between(low, high)
    limit = problem.budgets[0].limit
    assert set(mix.values()) == {*low.values(), *high.values()}
    assert limit * (1 - SLACK) <= problem.price("size_bytes", mix) <= limit
    assert problem.between(low, high) == mix


def test_between_two_that_are_both_over_is_an_error(problem_of):
    problem = problem_of(20, 9, budget=0.3)
    with pytest.raises(BudgetError, match="the cheapest has"):
        problem.between(uniform(problem, 0.1), uniform(problem, 0.2))


def test_between_without_a_budget_is_an_error(problem_of):
    problem = problem_of(3, 4)
    with pytest.raises(ConfigError, match="to meet a budget, found none"):
        problem.between(uniform(problem, 0.1), uniform(problem, 0.2))
