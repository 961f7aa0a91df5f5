import time

import numpy as np
import pytest
from autoprune_plugins.genetic import GeneticSampler, register_samplers

from autoprune.policy import Action, Layer, Site
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.problem import Problem
from autoprune.searching.rows import Trial
from autoprune.searching.space import SearchSpace
from autoprune.searching.strategies import Brief

ACTIONS = tuple(Action.parse(f"wanda(sparsity=0.{tenths})") for tenths in range(1, 10))


def make_problem(blocks, *, actions=ACTIONS, share=0.5, sizes=(100, 300)):
    """Two sites a block, of different sizes; an action costs what it keeps."""
    sites, table = [], {}
    for block in range(blocks):
        for role, size in zip(("q", "up"), sizes, strict=True):
            layer = Layer(f"l.{block}.{role}", (size, 10), "float32", block, role, None)
            sites.append(Site(f"blocks.{block}.{role}", (layer,)))
            table[sites[-1].name] = 10.0 * size * np.linspace(1, 0.1, len(actions))
    space = SearchSpace(tuple(sites), {site.name: actions for site in sites})
    low, high = (sum(pick(row) for row in table.values()) for pick in (min, max))
    budget = Budget("size_bytes", 7 + low + share * (high - low))
    return Problem(space, (Prices("size_bytes", table, 7.0),), (budget,))


def make_costs(problem, seed=0):
    """What each choice costs: less in later blocks, and less the larger the site."""
    sites = problem.space.sites
    depth = np.array([site.layers[0].block for site in sites]) / len(sites)
    weight = np.exp(-4 * depth + np.random.default_rng(seed).normal(0, 0.5, len(sites)))
    prices = problem.prices[0].padded(problem.space)
    return weight[:, None] * np.exp(-4 * prices / prices.max(axis=1, keepdims=True))


def make_row(problem, indices, values, number=0, **fields):
    policy = problem.space.at(indices)
    return Trial(
        number=number,
        state="complete",
        origin="test",
        policy=policy,
        params=problem.space.params(policy),
        seed=0,
        started="",
        finished="",
        values=tuple(values),
        **fields,
    )


def search(problem, measure, trials, start=()):
    """Propose and measure, as a study does."""
    rows = [make_row(problem, one, measure(one), n) for n, one in enumerate(start)]
    while len(rows) < trials:
        measured = rows[0].values if rows else (0.0,)
        brief = Brief(len(rows), len(measured), problem, tuple(rows))
        indices, _ = GeneticSampler(brief).propose()
        rows.append(make_row(problem, indices, measure(indices), len(rows)))
    return rows


@pytest.fixture(scope="module")
def problem():
    return make_problem(12)


@pytest.fixture(scope="module")
def kl(problem):
    costs = make_costs(problem)
    return lambda indices: (float(costs[np.arange(len(costs)), indices].sum()),)


def test_factory():
    (factory,) = register_samplers()
    assert (factory.name, factory.several) == ("genetic", True)
    assert isinstance(factory.make(Brief(0, 1, make_problem(2))), GeneticSampler)


def test_beats_random_draws_within_the_budget(problem, kl):
    rows = search(problem, kl, 200, [np.full(24, 4)])
    rng = np.random.default_rng(0)
    drawn = [problem.projection.fit(rng.integers(9, size=24), rng) for _ in range(200)]
    best = min(row.values[0] for row in rows)
    assert best < 0.8 * min(kl(one)[0] for one in drawn)
    assert best < 0.8 * rows[0].values[0]
    limit = problem.budgets[0].limit
    for row in rows:
        assert 0.998 * limit <= problem.price("size_bytes", row.policy) <= limit
    assert len({row.policy.fingerprint for row in rows}) == 200


def test_equal_state_gives_equal_proposals(problem, kl):
    one, other = (search(problem, kl, 60) for _ in range(2))
    assert [row.params for row in one] == [row.params for row in other]


def test_child_keeps_what_all_parents_agree_on(problem, kl):
    rng = np.random.default_rng(0)
    even = np.full(24, 4)
    rows = []
    for number in range(40):  # the last 12 sites never differ
        one = even.copy()
        up, down = rng.permutation(6)[:2] * 2
        one[[up, down]] = 3, 5
        rows.append(make_row(problem, one, kl(one), number))
    for seed in range(20):
        indices, _ = GeneticSampler(Brief(seed, 1, problem, tuple(rows))).propose()
        # Only the mutation, of a few switches, leaves their genes.
        assert (indices[12:] != 4).sum() <= 8


def test_rows_over_a_limit_are_the_last_to_be_parents(problem, kl):
    bad = make_row(problem, np.full(24, 4), (0.0,), constraints={"perplexity": 1.0})
    rng = np.random.default_rng(0)
    start = np.array([0, 8] * 12)  # nothing in common with the other
    good = make_row(problem, problem.projection.fit(start, rng), (9.0,), 1)
    indices, _ = GeneticSampler(Brief(0, 1, problem, (bad, good))).propose()
    kept = problem.space.index(good.policy) == indices
    assert kept.sum() > (indices == 4).sum()


def test_spans_a_front_of_two_objectives(problem, kl):
    free = Problem(problem.space, problem.prices)
    prices = free.prices[0].padded(free.space)

    def measure(indices):
        return *kl(indices), float(prices[np.arange(24), indices].sum())

    start = [np.full(24, level) for level in (1, 4, 7)]
    values = np.array([row.values for row in search(free, measure, 200, start)])
    assert (values < values[1]).all(axis=1).any()
    better = (values[:, None] < values[None]).all(axis=2).any(axis=0)
    front = values[~better]
    assert len(front) >= 20
    assert front[:, 1].max() > 2 * front[:, 1].min()


def test_proposes_quickly_at_210_sites():
    actions = tuple(Action.parse(f"wanda(sparsity=0.{n})") for n in range(10, 26))
    problem = make_problem(105, actions=actions)
    rng = np.random.default_rng(0)
    rows = tuple(
        make_row(problem, rng.integers(16, size=210), (float(n),), n)
        for n in range(300)
    )
    began = time.perf_counter()
    for seed in range(4):
        GeneticSampler(Brief(seed, 1, problem, rows)).propose()
    assert (time.perf_counter() - began) / 4 < 0.5
