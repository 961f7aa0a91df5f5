"""Only choices that another one beats clearly are dropped, and none that is needed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import tiny

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.method import Source
from autoprune.compression.variant import Variant
from autoprune.models.layers import inventory
from autoprune.models.statistics import NO_STATISTICS
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Action, Site
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.prefilter import cheap_scores, prefilter
from autoprune.searching.problem import Problem
from autoprune.searching.space import SearchSpace

Sites = Callable[[int], tuple[Site, ...]]

A, B, C, D = (Action.parse(f"wanda(sparsity=0.{i})") for i in (1, 2, 3, 4))


def problem_of(
    sites: tuple[Site, ...], actions: tuple[Action, ...], *tables: list[float]
) -> Problem:
    space = SearchSpace(sites, {site.name: actions for site in sites})
    prices = tuple(
        Prices(name, {site.name: np.array(table) for site in sites}, 7.0)
        for name, table in zip(("size_bytes", "latency_ms"), tables, strict=False)
    )
    return Problem(space, prices, (Budget("size_bytes", 1000.0),))


def scores_of(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def test_what_is_smaller_and_closer_drops_the_other(sites_of: Sites) -> None:
    problem = problem_of(sites_of(1), (A, B, C, D), [100.0, 90.0, 80.0, 99.0])
    found = prefilter(problem, scores_of([1.0, 0.4, 0.7, 0.1]))
    # B and D would drop A; D is too close in bytes to drop it, C is too bad.
    assert found.kept.tolist() == [[False, True, True, True]]
    ((site, action, reason),) = found.dropped
    assert (site, action) == ("blocks.0.up", A)
    assert reason == (
        "'wanda(sparsity=0.2)' has 90% of its size_bytes and about 40% of its error"
    )
    assert found.problem.space.choices["blocks.0.up"] == (B, C, D)
    (prices,) = found.problem.prices
    assert prices.table["blocks.0.up"].tolist() == [90.0, 80.0, 99.0]
    assert prices.constant == 7.0
    assert found.problem.budgets == problem.budgets
    assert found.problem.space.refused == found.dropped
    assert found.variants == 1
    assert found.saved_seconds(0.5) == 0.5


def test_no_other_metric_may_suffer(sites_of: Sites) -> None:
    sites, scores = sites_of(1), scores_of([1.0, 0.1, 0.4])
    sizes = [100.0, 90.0, 50.0]
    problem = problem_of(sites, (A, B, C), sizes, [5.0, 6.0, 6.0])
    assert prefilter(problem, scores).dropped == ()
    problem = problem_of(sites, (A, B, C), sizes, [5.0, 5.0, 6.0])
    assert [action for _, action, _ in prefilter(problem, scores).dropped] == [A]
    problem = problem_of(sites, (A, B, C), sizes, [-5.0, -5.0, -6.0])
    assert [action for _, action, _ in prefilter(problem, scores).dropped] == [A]


def test_two_choices_stay_and_those_that_are_named(sites_of: Sites) -> None:
    problem = problem_of(sites_of(1), (A, B, C, D), [100.0, 90.0, 80.0, 70.0])
    scores = scores_of([1.0, 0.3, 0.1, 0.01])
    assert prefilter(problem, scores).kept.tolist() == [[False, False, True, True]]
    kept = prefilter(problem, scores, keep={A}).kept
    assert kept.tolist() == [[True, False, False, True]]
    two = problem_of(sites_of(1), (A, B), [100.0, 50.0])
    assert prefilter(two, scores_of([1.0, 0.1])).dropped == ()


@pytest.mark.parametrize("seed", range(5))
def test_the_regret_is_that_of_the_whole_optimum(seed: int, sites_of: Sites) -> None:
    rng = np.random.default_rng(seed)
    sites = sites_of(3)
    problem = problem_of(sites, (A, B, C, D), [100.0, 80.0, 60.0, 40.0])
    problem = Problem(problem.space, problem.prices, (Budget("size_bytes", 207.0),))
    scores = rng.uniform(0.1, 1, (3, 4))
    found = prefilter(problem, scores, score_margin=0.1)
    costs = rng.uniform(0.1, 1, (3, 4))

    def least(allowed: np.ndarray) -> float:
        prices = np.array([100.0, 80.0, 60.0, 40.0])
        return min(
            costs[range(3), at].sum()
            for at in map(list, np.ndindex(4, 4, 4))
            if allowed[range(3), at].all() and prices[at].sum() <= 200
        )

    plain = least(found.kept) - least(np.ones((3, 4), dtype=bool))
    assert found.regret(problem, costs) == pytest.approx(plain, abs=1e-5)
    costs = scores
    whole = least(np.ones((3, 4), dtype=bool))
    share = least(found.kept) / whole - 1
    assert found.foreseen == pytest.approx(share, abs=1e-5)
    nothing = prefilter(problem, scores, score_margin=1.0)
    assert nothing.dropped == () and nothing.regret(problem, costs) == 0


PLAIN = (
    "dense",
    "magnitude(per=layer, sparsity=0.5)",
    "magnitude(pattern=2:4)",
    "rtn(bits=4, group=16)",
    "rtn(bits=3, group=16, symmetric=true)",
    "magnitude(per=layer, sparsity=0.25) + rtn(bits=8, group=16)",
    "magnitude(norm=l2, per=layer, sparsity=0.5, tile=2x8)",
    "magnitude(norm=l2, per=layer, sparsity=0.5, tile=1x8) + nf4(group=16)",
    "fp8",
)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_are_the_errors_of_the_plain_methods(kind: str) -> None:
    """For weights of few rows, which are scored as a whole."""
    methods = load_plugins().methods
    known = Actions(methods)
    found = inventory(tiny(kind), register_architectures())
    stitched = StitchedModel(tiny(kind), found.layers)
    sites = [site for site in found.sites if site.name.startswith("blocks.0")]
    actions = tuple(known.canonical(Action.parse(text)) for text in PLAIN)
    space = SearchSpace(tuple(sites), {site.name: actions for site in sites})
    scores = cheap_scores(stitched, known, space)
    assert scores.shape == (len(sites), len(PLAIN))
    assert not scores[:, 0].any()
    for row, site in enumerate(sites):
        for column, action in enumerate(actions):
            plain = 0.0
            for layer in site.layers:
                weight = stitched.dense_weight(layer)
                variant = Variant.dense(weight)
                for step in action.steps:
                    method, settings = methods[step.method], known.settings(step)
                    source = Source(layer, variant)
                    made = method.compress([source], NO_STATISTICS, [settings])
                    variant = made[0][0]
                error = (variant.weight - weight).square().sum()
                plain += float(error / weight.square().sum())
            assert scores[row, column] == pytest.approx(plain, rel=1e-3, abs=1e-9)


def test_some_rows_stand_for_all_of_a_large_weight() -> None:
    known = Actions(load_plugins().methods)
    model = tiny("llama", intermediate_size=1024)
    found = inventory(model, register_architectures())
    stitched = StitchedModel(model, found.layers)
    site = next(s for s in found.sites if s.layers[0].role == "gate_proj")
    actions = tuple(known.canonical(Action.parse(text)) for text in PLAIN)
    space = SearchSpace((site,), {site.name: actions})
    scores = cheap_scores(stitched, known, space)[0]
    weights = [stitched.dense_weight(layer) for layer in site.layers]
    halves = 0.0
    for weight in weights:
        small = weight.abs().flatten().sort().values[: weight.numel() // 2]
        halves += float(small.square().sum() / weight.square().sum())
    assert scores[1] == pytest.approx(halves, rel=0.1)


def test_inputs_weigh_columns() -> None:
    known = Actions(load_plugins().methods)
    model = tiny("llama")
    found = inventory(model, register_architectures())
    stitched = StitchedModel(model, found.layers)
    site = next(s for s in found.sites if s.layers[0].role == "down_proj")
    (layer,) = site.layers
    half = known.canonical(Action.parse("magnitude(sparsity=0.5)"))
    space = SearchSpace((site,), {site.name: (DENSE, half)})
    squares = torch.zeros(layer.shape[1])
    squares[: layer.shape[1] // 2] = 1.0  # the other half of the inputs is always 0
    found_scores = cheap_scores(
        stitched, known, space, square_sums={str(layer.input): squares}
    )
    assert found_scores[0, 1] == pytest.approx(0)
    assert cheap_scores(stitched, known, space)[0, 1] > 0.01
