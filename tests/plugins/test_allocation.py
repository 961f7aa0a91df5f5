from dataclasses import replace

import numpy as np
import pytest
from autoprune_plugins.allocation import register_samplers

from autoprune.errors import ConfigError
from autoprune.policy import Action, Layer, Site
from autoprune.searching.allocation import allocate
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.problem import Problem
from autoprune.searching.refit import fit_multipliers
from autoprune.searching.rows import Trial
from autoprune.searching.space import SearchSpace
from autoprune.searching.strategies import Brief

(FACTORY,) = register_samplers()
SITES, CHOICES = 24, 6


def make_problem(*, latency=False):
    layers = [Layer(f"l{i}", (8, 8), "float32", i, "q", None) for i in range(SITES)]
    places = tuple(Site(f"blocks.{i}.q", (layer,)) for i, layer in enumerate(layers))
    actions = tuple(Action.parse(f"rtn(bits={bits})") for bits in range(2, 2 + CHOICES))
    space = SearchSpace(places, {site.name: actions for site in places})
    rng = np.random.default_rng(0)
    sizes = {s.name: rng.integers(90, 110) * np.arange(2.0, 8) for s in places}
    times = {s.name: rng.uniform(0.1, 1) * np.arange(2.0, 8) ** 0.5 for s in places}
    prices = (Prices("size_bytes", sizes), Prices("latency_ms", times))
    limits = [Budget("size_bytes", 400.0 * SITES)]
    if latency:
        low, high = prices[1].reach(space)
        limits.append(Budget("latency_ms", low + 0.4 * (high - low)))
    return Problem(space, prices, tuple(limits))


class Landscape:
    """An additive score, and sensitivities that are wrong about it."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        levels = 0.25 ** np.arange(CHOICES)
        self.sensitivities = rng.lognormal(0, 1, (SITES, 1)) * levels
        self.true = self.sensitivities * rng.lognormal(0, 0.8, (SITES, 1))

    def kl(self, indices):
        return float(self.true[np.arange(SITES), indices].sum())


def row(problem, number, indices, kl):
    policy = problem.space.at(indices)
    params = problem.space.params(policy)
    return Trial(number, "complete", "allocation", policy, params, 0, "", "", (kl,))


def search(problem, landscape, trials, history=()):
    history = list(history)
    while len(history) < trials:
        brief = Brief(
            seed=1000 + len(history),
            objectives=1,
            problem=problem,
            history=tuple(history),
            sensitivities=landscape.sensitivities,
        )
        indices, notes = FACTORY.make(brief).propose()
        assert set(notes) == {"noise"}
        history.append(row(problem, len(history), indices, landscape.kl(indices)))
    return history


def test_the_first_proposal_is_the_allocation_on_sensitivities():
    problem, landscape = make_problem(), Landscape(0)
    (first,) = search(problem, landscape, 1)
    expected = allocate(problem, landscape.sensitivities)
    assert first.policy == problem.space.at(expected)


@pytest.mark.parametrize("seed", range(3))
def test_fits_find_better_than_the_first_allocation_and_than_random(seed):
    problem, landscape = make_problem(), Landscape(seed)
    history = search(problem, landscape, 40)
    best = min(trial.values[0] for trial in history)
    least = landscape.kl(allocate(problem, landscape.true))
    rng = np.random.default_rng(0)
    draws = rng.integers(CHOICES, size=(40, SITES))
    random = min(landscape.kl(problem.projection.fit(d, rng)) for d in draws)
    first = history[0].values[0]
    # Half of what wrong sensitivities cost is won back.
    assert best - least < 0.5 * (first - least)
    assert best < 0.5 * random


def test_two_budgets_are_kept_exactly_and_nothing_is_proposed_twice():
    problem = make_problem(latency=True)
    history = search(problem, Landscape(0), 20)
    assert all(problem.within(trial.policy) for trial in history)
    assert len({str(trial.policy) for trial in history}) == 20


def test_a_resumed_search_proposes_what_an_uninterrupted_one_does():
    problem, landscape = make_problem(), Landscape(0)
    whole = search(problem, landscape, 12)
    resumed = search(problem, landscape, 12, history=whole[:5])
    assert [t.policy for t in whole] == [t.policy for t in resumed]


def test_what_was_given_up_is_fitted_too():
    problem, landscape = make_problem(), Landscape(0)
    whole = search(problem, landscape, 8)
    worst = max(whole, key=lambda trial: trial.values[0])
    given_up = [replace(t, state="pruned") if t is worst else t for t in whole]
    without = [replace(t, values=()) if t is worst else t for t in whole]
    fitted, also, blind = (
        search(problem, landscape, 9, history)[-1].policy
        for history in (whole, given_up, without)
    )
    assert also == fitted != blind


def test_what_is_not_complete_is_not_fitted_but_not_repeated():
    problem, landscape = make_problem(), Landscape(0)
    first = allocate(problem, landscape.sensitivities)
    policy = problem.space.at(first)
    params = problem.space.params(policy)
    failed = Trial(0, "failed", "allocation", policy, params, 0, "", "")
    second = search(problem, landscape, 2, history=[failed])[1]
    assert second.policy != policy
    assert problem.within(second.policy)


def test_multipliers_are_found_from_enough_trials():
    rng = np.random.default_rng(0)
    features = rng.lognormal(0, 1, (60, 10))
    true = rng.lognormal(0, 0.5, 10)
    found = fit_multipliers(features, features @ true)
    assert np.corrcoef(found, true)[0, 1] > 0.99


def test_multipliers_stay_at_one_where_there_is_nothing_to_learn():
    features = np.ones((5, 4))
    assert fit_multipliers(features, np.full(5, 2.0)).tolist() == [1.0] * 4
    assert fit_multipliers(0 * features, np.full(5, 2.0)).tolist() == [1.0] * 4


def test_multipliers_are_never_below_their_least():
    rng = np.random.default_rng(0)
    features = rng.lognormal(0, 1, (40, 3))
    found = fit_multipliers(features, features @ np.array([1.0, 1.0, 0.0]) + 0.01)
    assert found[2] < 0.2
    assert found.min() >= 0.02


def test_needs_sensitivities_and_a_budget():
    problem = make_problem()
    assert FACTORY.needs == {"sensitivities"} and not FACTORY.several
    with pytest.raises(ConfigError, match="'allocation' needs sensitivities"):
        FACTORY.make(Brief(0, 1, problem))
    free = Problem(problem.space, problem.prices)
    with pytest.raises(ConfigError, match="'allocation' needs a budget"):
        FACTORY.make(Brief(0, 1, free, sensitivities=Landscape(0).sensitivities))
