import json
import time

import numpy as np
import pytest
from autoprune_plugins.policy_gradient import (
    BATCH,
    WARM_UP,
    PolicyGradientSampler,
    Walk,
    register_samplers,
)

from autoprune.policy import Action, Layer, Site
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.problem import Problem
from autoprune.searching.rows import Trial
from autoprune.searching.space import SearchSpace
from autoprune.searching.strategies import Brief, PolicySampler, notes_of

METHODS = (("rtn", "bits"), ("gptq", "bits"))
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


def search(problem, measure, trials):
    """Propose and measure, as a study does; notes go through JSON, as to a ledger."""
    rows = []
    while len(rows) < trials:
        brief = Brief(len(rows), 1, problem, tuple(rows))
        indices, notes = PolicyGradientSampler(brief).propose()
        noted = {PolicySampler.NOTES + name: note for name, note in notes.items()}
        attrs = json.loads(json.dumps(noted))
        values = (measure(indices),)
        row = make_row(problem, indices, values, len(rows), system_attrs=attrs)
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def problem():
    return make_problem(12)


@pytest.fixture(scope="module")
def kl(problem):
    costs = make_costs(problem)
    return lambda indices: float(costs[np.arange(len(costs)), indices].sum())


def test_factory():
    (factory,) = register_samplers()
    assert (factory.name, factory.several) == ("policy_gradient", False)
    assert isinstance(factory.make(Brief(0, 1, make_problem(2))), PolicyGradientSampler)


def test_beats_random_draws_within_the_budget(problem, kl):
    rows = search(problem, kl, 200)
    rng = np.random.default_rng(0)
    drawn = [problem.projection.fit(rng.integers(9, size=24), rng) for _ in range(200)]
    values = [row.values[0] for row in rows]
    assert min(values) < 0.8 * min(kl(one) for one in drawn)
    assert np.mean(values[-40:]) < 0.8 * np.mean(values[:40])
    limit = problem.budgets[0].limit
    for row in rows:
        assert 0.998 * limit <= problem.price("size_bytes", row.policy) <= limit


def test_equal_state_gives_equal_proposals(problem, kl):
    one, other = (search(problem, kl, 60) for _ in range(2))
    assert [row.params for row in one] == [row.params for row in other]


def test_learns_from_full_batches_only(problem, kl):
    rows = search(problem, kl, WARM_UP + 2 * BATCH + 1)
    updates = [notes_of(row)["update"] for row in rows]
    assert updates == [0] * WARM_UP + [1] * BATCH + [2] * BATCH + [3]
    learned = [row.number for row in rows if "weights" in notes_of(row)]
    assert learned == [WARM_UP, WARM_UP + BATCH, WARM_UP + 2 * BATCH]


def test_equal_rewards_teach_nothing(problem):
    rows = search(problem, lambda indices: 1.0, WARM_UP + 1)
    weights = notes_of(rows[-1])["weights"]
    assert not any(np.any(values) for values in weights.values())


def test_actions_leave_the_budget_reachable(problem):
    walk = Walk(problem)
    limit = problem.budgets[0].limit - 7
    cheapest, dearest = walk.price.min(axis=1), walk.price.max(axis=1)
    spent = limit - cheapest[1:].sum() - walk.price[0]  # after each first action
    allowed = walk.look(0, np.zeros(1), np.full(1, 0.5))[2]
    assert (allowed == (spent >= 0)).all()
    # At the last site just the action is left that fills the budget up.
    for last in range(9):
        before = limit - walk.price[-1, last]
        left, _, allowed = walk.look(23, np.array([before]), np.full(1, 0.5))
        assert np.flatnonzero(allowed[0]).tolist() == [last]
        assert left[0] == pytest.approx(walk.share[-1, last])
    # With too little spent, what is too cheap is barred as well.
    before = limit - dearest[-1] - walk.price[-2, 4]
    allowed = walk.look(22, np.array([before]), np.full(1, 0.5))[2]
    assert not allowed[0, 5:].any()
    assert allowed[0, 4]


def test_without_budgets_every_action_is_allowed(problem):
    free = Problem(problem.space)
    rows = search(free, lambda indices: float(indices.sum()), 120)
    sums = [row.values[0] for row in rows]
    assert np.mean(sums[:16]) == pytest.approx(4 * 24, rel=0.15)
    assert np.mean(sums[-16:]) < 0.5 * np.mean(sums[:16])


def test_learns_which_method_to_take():
    texts = [f"{m}({p}={v})" for v in (1, 2, 3) for m, p in METHODS]
    problem = make_problem(8, actions=tuple(map(Action.parse, texts)))

    def measure(indices):  # every second choice is bad, whatever it costs
        return float((indices % 2).sum())

    values = [row.values[0] for row in search(problem, measure, 150)]
    assert np.mean(values[-20:]) < 0.6 * np.mean(values[:20])


def test_proposes_quickly_at_210_sites():
    actions = tuple(Action.parse(f"wanda(sparsity=0.{n})") for n in range(10, 26))
    problem = make_problem(105, actions=actions)
    rng = np.random.default_rng(0)
    rows = tuple(
        make_row(
            problem,
            rng.integers(16, size=210),
            (float(n),),
            n,
            system_attrs={PolicySampler.NOTES + "update": 0} if n >= 284 else {},
        )
        for n in range(300)
    )
    began = time.perf_counter()
    PolicyGradientSampler(Brief(0, 1, problem, rows[:284])).propose()
    PolicyGradientSampler(Brief(0, 1, problem, rows)).propose()
    assert (time.perf_counter() - began) / 2 < 0.5
