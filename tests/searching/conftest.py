from collections.abc import Callable

import numpy as np
import pytest

from autoprune.policy import Action, Layer, Site
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.problem import Problem
from autoprune.searching.space import SearchSpace


def make_sites(count: int) -> tuple[Site, ...]:
    layers = [
        Layer(f"layers.{i}.up_proj", (8, 16), "float32", i, "up_proj", f"in.{i}")
        for i in range(count)
    ]
    return tuple(Site(f"blocks.{i}.up", (layer,)) for i, layer in enumerate(layers))


def make_problem(
    sites: int, choices: int, *, budget: float | None = None, seed: int = 0
) -> Problem:
    """A problem of random sizes; ``budget`` is a share of the way to the largest."""
    rng = np.random.default_rng(seed)
    places = make_sites(sites)
    actions = tuple(Action.parse(f"wanda(sparsity=0.{i + 1})") for i in range(choices))
    space = SearchSpace(places, {site.name: actions for site in places})
    shares = 1 - (np.arange(choices) + 1) / 10
    table = {s.name: np.round(rng.integers(100, 10_000) * shares) for s in places}
    prices = Prices("size_bytes", table, constant=500.0)
    if budget is None:
        return Problem(space, (prices,))
    low, high = (sum(f(table[s.name]) for s in places) + 500 for f in (min, max))
    limit = Budget("size_bytes", float(low + budget * (high - low)))
    return Problem(space, (prices,), (limit,))


@pytest.fixture
def problem_of() -> Callable[..., Problem]:
    """Makes problems of random sizes."""
    return make_problem


@pytest.fixture
def sites_of() -> Callable[[int], tuple[Site, ...]]:
    """Makes sites of one layer each."""
    return make_sites
