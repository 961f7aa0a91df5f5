import itertools

import numpy as np
import pytest

from autoprune.errors import BudgetError, ConfigError
from autoprune.searching.allocation import allocate, front
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.problem import Problem


def costs_of(problem, seed):
    """Costs that fall with the price, noisily, as true ones do."""
    rng = np.random.default_rng(seed + 100)
    shape = problem.prices[0].padded(problem.space).shape
    levels = np.linspace(0.1, 1, shape[1]) ** 2
    return levels * rng.lognormal(0, 1, (shape[0], 1)) * rng.lognormal(0, 0.4, shape)


def with_latency(problem, share, seed):
    """A second budget whose prices pull another way."""
    rng = np.random.default_rng(seed + 200)
    table = {
        name: prices * rng.lognormal(0, 0.7, prices.shape)
        for name, prices in problem.prices[0].table.items()
    }
    latency = Prices("latency_ms", table, constant=3.25)
    low, high = latency.reach(problem.space)
    budget = Budget("latency_ms", low + share * (high - low))
    return Problem(
        problem.space, (*problem.prices, latency), (*problem.budgets, budget)
    )


def everything(problem, costs):
    """Every policy with its cost and its prices."""
    choices = [range(costs.shape[1])] * len(costs)
    policies = np.array(list(itertools.product(*choices)))
    rows = np.arange(len(costs))
    prices = [p.padded(problem.space)[rows, policies] for p in problem.prices]
    sums = [
        p.sum(axis=1) + entry.constant
        for p, entry in zip(prices, problem.prices, strict=True)
    ]
    return policies, costs[rows, policies].sum(axis=1), np.array(sums)


def cost_of(costs, indices):
    return costs[np.arange(len(indices)), indices].sum()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_one_budget_gives_what_brute_force_gives(problem_of, seed, share):
    problem = problem_of(6, 4, budget=share, seed=seed)
    costs = costs_of(problem, seed)
    _, every, sums = everything(problem, costs)
    found = allocate(problem, costs)
    assert problem.within(problem.space.at(found))
    within = sums[0] <= problem.budgets[0].limit
    assert cost_of(costs, found) == pytest.approx(every[within].min(), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_two_budgets_give_what_brute_force_gives(problem_of, seed):
    problem = with_latency(problem_of(6, 4, budget=0.5, seed=seed), 0.4, seed)
    costs = costs_of(problem, seed)
    _, every, sums = everything(problem, costs)
    limits = np.array([budget.limit for budget in problem.budgets])
    found = allocate(problem, costs)
    assert problem.within(problem.space.at(found))
    best = every[(sums <= limits[:, None]).all(axis=0)].min()
    assert cost_of(costs, found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("changes", [0, 1, 2, 4])
@pytest.mark.parametrize("levels", [None, 1, 2])
def test_trust_region_gives_what_brute_force_gives(problem_of, changes, levels):
    problem = problem_of(6, 4, budget=0.5, seed=3)
    now = allocate(problem, costs_of(problem, 3))
    # Slopes at a policy are of any sign, and nothing for what stands.
    costs = np.random.default_rng(0).normal(size=(6, 4))
    costs[np.arange(6), now] = 0
    policies, every, sums = everything(problem, costs)
    within = (sums[0] <= problem.budgets[0].limit) & (
        (policies != now).sum(axis=1) <= changes
    )
    if levels is not None:  # each choice of this space is dearer than the next
        within &= (np.abs(policies - now) <= levels).all(axis=1)
    found = allocate(problem, costs, now=now, changes=changes, levels=levels)
    assert problem.within(problem.space.at(found))
    assert (found != now).sum() <= changes
    assert cost_of(costs, found) == pytest.approx(every[within].min(), abs=1e-12)


def test_long_lists_are_left_to_the_solver(problem_of, monkeypatch):
    monkeypatch.setattr("autoprune.searching.knapsack.STATES", 2)
    monkeypatch.setattr("autoprune.searching.knapsack.FEW", 1)
    monkeypatch.setattr("autoprune.searching.knapsack.GAP", 1e-9)
    for seed in range(4):
        problem = with_latency(problem_of(6, 4, budget=0.5, seed=seed), 0.4, seed)
        costs = costs_of(problem, seed)
        _, every, sums = everything(problem, costs)
        limits = np.array([budget.limit for budget in problem.budgets])
        best = every[(sums <= limits[:, None]).all(axis=0)].min()
        found = allocate(problem, costs)
        assert problem.within(problem.space.at(found))
        assert cost_of(costs, found) == pytest.approx(best, rel=1e-6)


def test_a_policy_that_just_fits_is_found_and_nothing_over_it(problem_of):
    problem = problem_of(8, 5)
    costs = costs_of(problem, 0)
    policy = np.array([0, 1, 2, 3, 4, 3, 2, 1])
    spent = problem.price("size_bytes", problem.space.at(policy))
    # Only this policy is worth having, at exactly its price.
    costs[np.arange(8), policy] = -100.0
    exact = allocate(problem, costs, budgets=[Budget("size_bytes", spent)])
    assert exact.tolist() == policy.tolist()
    under = allocate(problem, costs, budgets=[Budget("size_bytes", spent - 1)])
    assert problem.price("size_bytes", problem.space.at(under)) <= spent - 1


def test_many_equal_sites_share_a_budget_to_the_last_unit(problem_of):
    space = problem_of(210, 8).space
    sizes = Prices("size_bytes", {site.name: np.arange(8.0) for site in space.sites})
    problem = Problem(space, (sizes,), (Budget("size_bytes", 700.0),))
    costs = np.tile(2.0 ** -np.arange(8), (210, 1))
    found = allocate(problem, costs)
    # Convex costs: 70 sites of 4 and 140 of 3.
    assert np.bincount(found).tolist() == [0, 0, 0, 140, 70]


def test_without_a_budget_every_site_takes_its_best(problem_of):
    problem = problem_of(5, 3)
    costs = costs_of(problem, 0)
    assert allocate(problem, costs).tolist() == costs.argmin(axis=1).tolist()
    now = costs.argmax(axis=1)
    gains = costs.max(axis=1) - costs.min(axis=1)
    moved = allocate(problem, costs, now=now, changes=2) != now
    assert set(np.flatnonzero(moved)) == set(np.argsort(-gains)[:2])


def test_choices_without_a_cost_are_not_taken(problem_of):
    problem = problem_of(6, 4, budget=0.9)
    costs = costs_of(problem, 0)
    costs[:, 0] = np.inf
    assert 0 not in allocate(problem, costs)


def test_equal_calls_give_equal_policies(problem_of):
    problem = with_latency(problem_of(40, 8, budget=0.4), 0.4, 0)
    costs = costs_of(problem, 0)
    assert allocate(problem, costs).tolist() == allocate(problem, costs).tolist()


def test_a_thousand_sites_are_allocated_close_to_the_bound(problem_of):
    problem = problem_of(1000, 9, budget=0.4)
    costs = costs_of(problem, 0)
    found = allocate(problem, costs)
    assert problem.within(problem.space.at(found))
    hull = front(problem, costs, "size_bytes")
    limit = problem.budgets[0].limit
    under = next(p.cost for p in reversed(hull) if p.price <= limit)
    over = next(p.cost for p in hull if p.price >= limit)
    assert over <= cost_of(costs, found) <= under


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({}, r"no policy of the space has size_bytes <= 600; the cheapest has [\d,]+"),
        (
            {"now": np.zeros(6, dtype=np.int64), "changes": 1, "levels": 2},
            r"no policy within 1 changes and 2 levels of now has size_bytes <= 600",
        ),
    ],
    ids=["space", "trust region"],
)
def test_budget_out_of_reach_is_named_with_what_is_reachable(problem_of, extra, match):
    problem = problem_of(6, 4)
    with pytest.raises(BudgetError, match=match):
        allocate(
            problem, costs_of(problem, 0), budgets=[Budget("size_bytes", 600)], **extra
        )


def test_budgets_that_exclude_each_other_are_both_named(problem_of):
    problem = problem_of(3, 2)
    name = {site.name: np.array([0.0, 9.0]) for site in problem.space.sites}
    latency = Prices("latency_ms", name)
    low, _ = problem.prices[0].reach(problem.space)
    both = Problem(problem.space, (*problem.prices, latency))
    budgets = [Budget("size_bytes", low), Budget("latency_ms", 9.0)]
    with pytest.raises(BudgetError, match=r"size_bytes <= .* and latency_ms <= 9 at o"):
        allocate(both, costs_of(both, 0), budgets=budgets)


def test_costs_that_do_not_fit_are_refused(problem_of):
    problem = problem_of(3, 2, budget=0.5)
    with pytest.raises(ConfigError, match=r"found shape \(3, 3\)"):
        allocate(problem, np.ones((3, 3)))
    with pytest.raises(ConfigError, match="with 6 others"):
        allocate(problem, np.full((3, 2), np.nan))
    with pytest.raises(BudgetError, match=r"1 of 3 sites .* is 'blocks.1.up'"):
        allocate(problem, np.array([[1.0, 2], [np.inf, np.inf], [1, 2]]))


def test_a_trust_region_needs_a_policy_and_levels_a_budget(problem_of):
    problem = problem_of(3, 2)
    with pytest.raises(ConfigError, match="give it as now"):
        allocate(problem, np.ones((3, 2)), changes=1)
    with pytest.raises(ConfigError, match="levels are steps of the first budget's"):
        allocate(problem, np.ones((3, 2)), now=np.zeros(3, dtype=np.int64), levels=1)


def test_sites_that_must_change_count_as_changes(problem_of):
    problem = problem_of(3, 2, budget=0.9)
    costs = np.array([[np.inf, 1.0], [np.inf, 1.0], [0.0, 1.0]])
    now = np.zeros(3, dtype=np.int64)
    with pytest.raises(BudgetError, match="2 sites must leave .* 1 changes do not"):
        allocate(problem, costs, now=now, changes=1)
    assert allocate(problem, costs, now=now, changes=2).tolist() == [1, 1, 0]


@pytest.mark.parametrize("seed", range(4))
def test_every_point_of_the_hull_is_on_the_true_front(problem_of, seed):
    problem = problem_of(5, 4, seed=seed)
    costs = costs_of(problem, seed)
    _, every, (sums,) = everything(problem, costs)
    points = front(problem, costs, "size_bytes")
    for price, cost, indices in points:
        best = every[sums <= price].min()
        assert cost == pytest.approx(best, rel=1e-12)
        assert cost_of(costs, indices) == pytest.approx(cost, rel=1e-12)
        assert problem.price("size_bytes", problem.space.at(indices)) == price
    assert points[0].price == sums.min()
    assert points[-1].cost == pytest.approx(every.min())
    prices, drops = [p.price for p in points], np.diff([p.cost for p in points])
    assert prices == sorted(prices)
    slopes = drops / np.diff(prices)
    assert (slopes < 0).all() and (np.diff(slopes) >= -1e-12).all()


def test_a_front_is_thinned_evenly_with_its_ends(problem_of):
    problem = problem_of(30, 6)
    costs = costs_of(problem, 0)
    whole = front(problem, costs, "size_bytes")
    thin = front(problem, costs, "size_bytes", count=9)
    assert len(whole) > 60 and len(thin) == 9
    assert thin[0].price == whole[0].price and thin[-1].price == whole[-1].price
    assert np.diff([p.price for p in thin]).max() < 0.2 * np.ptp(
        [p.price for p in whole]
    )
    with pytest.raises(ConfigError, match="count=1"):
        front(problem, costs, "size_bytes", count=1)
