from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from autoprune_plugins.layer_ratios import (
    ArithmeticProgression,
    ErdosRenyiKernel,
    GlobalMagnitude,
    Lamp,
    capped_densities,
    exponent,
    pruned_shares,
    register_formulas,
)

from autoprune.compression.sizes import Sizes
from autoprune.errors import ModelError
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import Action, Layer, Site
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.formulas import Formula, Ladder
from autoprune.searching.problem import Problem
from autoprune.searching.space import SearchSpace

TEXT = "magnitude(sparsity=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])"


def scene(
    weights: list[torch.Tensor], target: float, blocks: list[int] | None = None
) -> tuple[Ladder, Any]:
    """Make a ladder of layers with these weights, and what holds the weights."""
    layers = [
        Layer(f"l{i}", tuple(w.shape), "float32", block, "q", f"in.{i}")
        for i, (w, block) in enumerate(
            zip(weights, blocks or range(len(weights)), strict=True)
        )
    ]
    sites = tuple(Site(f"blocks.{la.block}.{la.name}", (la,)) for la in layers)
    actions = tuple(Action.parse_all(TEXT))
    zeros = np.arange(1, 10) / 10
    table = {site.name: site.numel * (1 - zeros) for site in sites}
    limit = sum(site.numel for site in sites) * (1 - target)
    space = SearchSpace(sites, {site.name: actions for site in sites})
    budget = Budget("kept", limit * (1 + 1e-12))
    ladder = Ladder.of(Problem(space, (Prices("kept", table),), (budget,)))
    by_layer = dict(zip(layers, weights, strict=True))
    bench: Any = Workbench.__new__(Workbench)  # these formulas read weights alone
    bench.stitched = SimpleNamespace(dense_weight=by_layer.__getitem__)
    return ladder, bench


def ratios(formula: Formula, *about: Any) -> dict[str, np.ndarray]:
    ladder, bench = scene(*about)
    found = formula.ratios(ladder, bench)
    for values in found.values():
        mean = values @ ladder.numel / ladder.numel.sum()
        assert mean == pytest.approx(ladder.target, abs=1e-9)
    return found


def test_sizes_are_counted() -> None:
    sizes = Sizes.of(torch.tensor([[1.0, -2.0, 0.0], [2.0, 1.0, -1.0]]), "l")
    assert sizes.values.tolist() == [0.0, 1.0, 2.0]
    assert sizes.counts.tolist() == [1.0, 3.0, 2.0]
    assert sizes.mean_square == pytest.approx(11 / 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sizes_agree_with_the_weights(dtype: torch.dtype, rng: torch.Generator) -> None:
    weight = torch.randn(40, 30, generator=rng).to(dtype)
    sizes = Sizes.of(weight.t(), "l")  # a view is counted as well
    ordered = weight.double().abs().flatten().sort().values.numpy()
    repeated = np.repeat(sizes.values, sizes.counts.astype(int))
    np.testing.assert_allclose(repeated, ordered, rtol=2**-8)


def test_a_weight_that_is_no_number_is_named() -> None:
    with pytest.raises(ModelError, match=r"the weight of blocks\.3\.up holds NaN"):
        Sizes.of(torch.tensor([[1.0, float("nan")]]), "blocks.3.up")


def test_lamp_scores_by_hand() -> None:
    """Squares 1, 4, 9, 16 over the sums of what is not smaller: 30, 29, 25, 16."""
    sizes = Sizes.of(torch.tensor([[4.0, -1.0], [3.0, 2.0]]), "l")
    assert sizes.lamp.tolist() == [1 / 30, 4 / 29, 9 / 25, 1.0]


def test_lamp_by_hand() -> None:
    """Scores 1/30, 4/29, 9/25, 1 and 1/4, 1/3, 1/2, 1 (a flat layer of ones)."""
    one = torch.tensor([[4.0, -1.0], [3.0, 2.0]])
    other = torch.tensor([[8.0, 4.0], [2.0, 1.0]])  # 1/85, 4/84, 16/80, 1
    found = ratios(Lamp(), [one, other], 0.5)["lamp"]
    # In order: 1/85, 1/30, 4/84, 4/29 | 16/80 ...
    assert found.tolist() == [0.5, 0.5]
    found = ratios(Lamp(), [one, other], 0.625)["lamp"]
    assert found.tolist() == [0.5, 0.75]


def test_lamp_does_not_depend_on_the_scale_of_a_layer(rng: torch.Generator) -> None:
    weights = [torch.randn(20, 20, generator=rng).pow(k) for k in (1, 3)]
    found = ratios(Lamp(), weights, 0.6)["lamp"]
    again = ratios(Lamp(), [weights[0] * 1024, weights[1]], 0.6)["lamp"]
    np.testing.assert_allclose(found, again)
    assert found[1] > found[0] and found.max() < 1  # heavy tails lose more


def test_lamp_agrees_with_the_definition(rng: torch.Generator) -> None:
    """Every weight ranked by itself, with sizes that bfloat16 tells apart."""
    steps = torch.randperm(200, generator=rng).reshape(2, 10, 10)
    weights = [(2 ** (s / 16)).bfloat16().float() for s in steps]
    scores, owner = [], []
    for index, weight in enumerate(weights):
        squares = weight.double().flatten().sort().values.square()
        scores += (squares / squares.flip(0).cumsum(0).flip(0)).tolist()
        owner += [index] * 100
    pruned = np.array(owner)[np.argsort(scores, kind="stable")[:120]]
    found = ratios(Lamp(), weights, 0.6)["lamp"]
    np.testing.assert_allclose(found, np.bincount(pruned) / 100, atol=0.01)


def test_global_magnitude_by_hand() -> None:
    small = torch.tensor([[0.1, 0.2], [0.3, 5.0]])
    large = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = ratios(GlobalMagnitude(), [small, large], 0.5)["global_magnitude"]
    assert found.tolist() == [0.75, 0.25]


def test_global_magnitude_empties_no_layer() -> None:
    small, large = torch.full((4, 5), 0.01), torch.ones(4, 5)
    found = ratios(GlobalMagnitude(), [small, large], 0.5)["global_magnitude"]
    # A layer keeps a quarter of the mean density, so it loses at most 7 of 8.
    np.testing.assert_allclose(found, [0.875, 0.125])


def test_shares_split_a_tie_in_order() -> None:
    scores = [np.array([1.0, 2.0]), np.array([1.0, 3.0])]
    counts = [np.array([4.0, 6.0]), np.array([5.0, 5.0])]
    assert pruned_shares(scores, counts, 0.25).tolist() == [0.4, 0.1]
    assert pruned_shares(scores, counts, 0.0).tolist() == [0.0, 0.0]
    assert pruned_shares(scores, counts, 1.0).tolist() == [1.0, 1.0]


def test_erk_by_hand() -> None:
    """Densities in the ratio of 2/4 = 0.5 to 20/100 = 0.2, over equal layers."""
    weights = [torch.zeros(4, 4), torch.zeros(10, 10)]
    found = ratios(ErdosRenyiKernel(), weights, 0.9)["erk"]
    # e * (0.5 * 16 + 0.2 * 100) = 11.6
    np.testing.assert_allclose(1 - found, np.array([0.5, 0.2]) * 11.6 / 28)


def test_erk_leaves_layers_dense_that_would_pass_it() -> None:
    weights = [torch.zeros(2, 2), torch.zeros(20, 20), torch.zeros(40, 10)]
    found = ratios(ErdosRenyiKernel(), weights, 0.5)["erk"]
    kept = np.array([1.0, 0.1, 0.125])  # of 402: 4 are full, 398 are shared
    kept[1:] *= 398 / (0.1 * 400 + 0.125 * 400)
    np.testing.assert_allclose(1 - found, kept)


def test_densities_that_cannot_be_met_are_all_full() -> None:
    found = capped_densities(np.array([1.0, 2.0]), np.array([4.0, 4.0]), 1.0)
    assert found.tolist() == [1.0, 1.0]


def test_atp_is_an_arithmetic_progression_over_depth() -> None:
    weights = [torch.zeros(4, 4) for _ in range(10)]
    blocks = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    found = ratios(ArithmeticProgression(), weights, 0.6, blocks)
    assert list(found) == ["atp 0.33", "atp 0.67"]
    for slope, values in zip((1 / 3, 2 / 3), found.values(), strict=True):
        # The steepest step is 0.2: it takes the last block from 0.6 to 1.
        expected = 0.6 + slope * 0.2 * (np.array(blocks) - 2)
        np.testing.assert_allclose(values, expected, atol=1e-9)


def test_atp_of_blocks_that_differ_in_size_keeps_the_mean() -> None:
    weights = [torch.zeros(4, 4), torch.zeros(8, 8), torch.zeros(16, 8)]
    steps = np.diff(ratios(ArithmeticProgression(), weights, 0.5)["atp 0.33"])
    assert steps[0] == pytest.approx(steps[1]) and steps[0] > 0


def test_one_block_gets_the_target() -> None:
    found = ratios(ArithmeticProgression(), [torch.zeros(4, 4)], 0.5)
    assert all(values.tolist() == pytest.approx([0.5]) for values in found.values())


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_a_power_law_gives_its_exponent(alpha: float) -> None:
    """Quantiles of a density that falls as ``x ** -alpha``."""
    places = (np.arange(400) + 0.5) / 400
    spectrum = (1 - places) ** (-1 / (alpha - 1))
    assert exponent(spectrum) == pytest.approx(alpha, rel=0.05)


def test_the_exponent_does_not_depend_on_the_scale() -> None:
    # The authors' slip apart, which compares one bound to a logarithm.
    spectrum = 10 + np.sort(np.random.default_rng(0).pareto(2.0, 300))
    assert exponent(spectrum * 8) == pytest.approx(exponent(spectrum))


def test_heavier_tails_have_smaller_exponents(rng: torch.Generator) -> None:
    light = torch.randn(60, 60, generator=rng)
    heavy = light * torch.logspace(0, 1.5, 60)
    found = [
        exponent(np.sort(torch.linalg.svdvals(w).square().double().numpy()))
        for w in (light, heavy)
    ]
    assert found[1] < found[0]


def test_they_are_registered() -> None:
    names = [formula.name for formula in register_formulas()]
    assert names == [
        "erk",
        "lamp",
        "global_magnitude",
        "atp",
        "entropy",
        "norm",
        "alpha_pruning",
    ]
