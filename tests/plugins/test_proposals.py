import numpy as np
import pytest
from autoprune_plugins.proposals import propose_policies

from autoprune.policy import DENSE, Action, Layer, Site
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.problem import Problem
from autoprune.searching.projection import SLACK
from autoprune.searching.space import SearchSpace

BITS = {
    "dense": 16.0,
    "wanda(sparsity=0.5)": 9.0,
    "wanda(sparsity=0.6)": 7.4,
    "wanda(sparsity=0.7)": 5.8,
    "wanda(pattern=2:4)": 10.0,
    "gptq(bits=4, group=64)": 4.25,
    "gptq(bits=8, group=64)": 8.25,
    "gptq(bits=3, group=32)": 3.5,
    "wanda(pattern=2:4) + gptq(bits=4)": 3.25,
}


def make_problem(limit, texts=tuple(BITS), lacking=(), **more):
    """Twenty sites; a limit in bits a weight; the last sites lack some actions."""
    layers = [Layer(f"l{i}", (8, 8), "float32", i, "q", None) for i in range(20)]
    sites = tuple(Site(f"blocks.{i}.q", (layer,)) for i, layer in enumerate(layers))
    choices = {}
    for number, site in enumerate(sites):
        gone = lacking if number >= 20 - more.get("sites", 4) else ()
        choices[site.name] = tuple(Action.parse(t) for t in texts if t not in gone)
    if more.get("fixed"):
        choices["blocks.0.q"] = (DENSE,)
    table = {
        name: np.array([64 / 8 * BITS[str(action)] for action in actions])
        for name, actions in choices.items()
    }
    budgets = (Budget("size_bytes", 20 * 64 / 8 * limit),) if limit else ()
    prices = (Prices("size_bytes", table),) if more.get("priced", True) else ()
    return Problem(SearchSpace(sites, choices), prices, budgets)


def test_every_uniform_policy_without_a_budget():
    found = dict(propose_policies(make_problem(None)))
    assert list(found) == [f"uniform {Action.parse(text)}" for text in BITS]
    for origin, policy in found.items():
        assert {f"uniform {action}" for action in policy.values()} == {origin}


def test_uniform_policies_within_the_budget_and_a_mix_of_each_family():
    problem = make_problem(8.0)
    found = dict(propose_policies(problem))
    assert list(found) == [
        "uniform wanda(sparsity=0.6)",
        "uniform wanda(sparsity=0.7)",
        "uniform gptq(bits=4, group=64)",
        "uniform gptq(bits=3, group=32)",
        "uniform wanda(pattern=2:4) + gptq(bits=4)",
        "uniform wanda(sparsity=0.6-0.5)",
        "uniform gptq(bits=4-8, group=64)",
        "uniform wanda(pattern=2:4) + gptq(bits=4) | dense",
    ]
    limit = problem.budgets[0].limit
    for origin in list(found)[5:]:
        assert len(set(found[origin].values())) == 2
        total = problem.price("size_bytes", found[origin])
        # Twenty equal sites: no mix is nearer than one site's step.
        assert limit - 8 * (16 - 3.25) <= total <= limit


def test_mix_fills_the_budget_where_sites_differ():
    problem = make_problem(8.0)
    sizes = np.random.default_rng(0).integers(100, 900, 20)
    pairs = zip(problem.prices[0].table.items(), sizes, strict=True)
    table = {site: prices * size for (site, prices), size in pairs}
    limit = float(sizes.sum()) * 64.0
    uneven = Problem(
        problem.space, (Prices("size_bytes", table),), (Budget("size_bytes", limit),)
    )
    mix = dict(propose_policies(uneven))["uniform wanda(sparsity=0.6-0.5)"]
    assert limit * (1 - SLACK) <= uneven.price("size_bytes", mix) <= limit


def test_every_proposal_is_within_every_budget():
    problem = make_problem(8.0)
    ones = {site: np.ones(len(p)) for site, p in problem.prices[0].table.items()}
    for site, actions in problem.space.choices.items():
        ones[site][actions.index(DENSE)] = 40.0
        ones[site][actions.index(Action.parse("wanda(sparsity=0.5)"))] = 40.0
    both = Problem(
        problem.space,
        (*problem.prices, Prices("gflop", ones)),
        (*problem.budgets, Budget("gflop", 20.0)),
    )
    found = dict(propose_policies(both))
    assert all(both.within(policy) for policy in found.values())
    assert set(found["uniform wanda(sparsity=0.6-0.5)"].values()) == {
        Action.parse("wanda(sparsity=0.6)")
    }


@pytest.mark.parametrize(("sites", "proposed"), [(4, True), (5, False)])
def test_action_that_a_fifth_of_the_sites_lacks_is_still_a_rival(sites, proposed):
    text = "wanda(sparsity=0.6)"
    problem = make_problem(None, lacking=(text,), sites=sites)
    found = dict(propose_policies(problem))
    assert (f"uniform {text}" in found) is proposed
    if proposed:  # the nearest in price stands in
        policy = found[f"uniform {text}"]
        assert str(policy["blocks.19.q"]) == "gptq(bits=8, group=64)"
        assert str(policy["blocks.0.q"]) == text


def test_without_prices_dense_stands_in():
    text = "wanda(sparsity=0.6)"
    problem = make_problem(None, lacking=(text,), priced=False)
    assert dict(propose_policies(problem))[f"uniform {text}"]["blocks.19.q"] == DENSE


def test_sites_without_a_choice_are_not_asked():
    found = dict(propose_policies(make_problem(None, fixed=True)))
    assert all(policy["blocks.0.q"] == DENSE for policy in found.values())
    assert len(found) == len(BITS)
