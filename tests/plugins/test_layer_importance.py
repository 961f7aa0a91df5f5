from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoprune_plugins.layer_importance import (
    HessianEigenvalue,
    HessianTrace,
    Owl,
    Sensitivity,
    largest_eigenvalue,
    logarithms,
    register_formulas,
)
from autoprune_plugins.layer_ratios import WeightEntropy, WeightNorm
from tiny_runs import config_of, write_text

from autoprune.compression.sizes import Sizes
from autoprune.plugins import load_plugins
from autoprune.policy import Action
from autoprune.searching.formulas import EPSILON, Ladder, band
from autoprune.searching.plan import Plan

LEVELS = "magnitude(sparsity=[0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])"


@pytest.fixture(scope="module")
def plan(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path_factory.mktemp("text")),
        space=[{"actions": [LEVELS]}],
        objective={"budgets": {"sparsity": 0.5}},
    )
    return Plan.make(config, load_plugins())


@pytest.fixture(scope="module")
def ladder(plan: Plan) -> Ladder:
    return Ladder.of(plan.problem)


@pytest.fixture(scope="module")
def inputs(plan: Plan) -> dict[str, torch.Tensor]:
    """What each layer reads in the dense model, seen by hooks of torch."""
    model, seen = plan.bench.stitched.model, {}
    plan.bench.stitched.restore()

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            seen[name] = args[0].reshape(-1, args[0].shape[-1]).double()

        return hook

    names = [layer.name for layer in plan.bench.layers if layer.block is not None]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(watch(name))
        for name in names
    ]
    with torch.no_grad():
        model(plan.bench.splits["statistics"].ids)
    for hook in hooks:
        hook.remove()
    return seen


def weight(plan: Plan, at: int) -> torch.Tensor:
    layer = Ladder.of(plan.problem).layers[at]
    return plan.bench.stitched.dense_weight(layer).double()


def check(ladder: Ladder, values: np.ndarray) -> None:
    mean = values @ ladder.numel / ladder.numel.sum()
    assert mean == pytest.approx(ladder.target, abs=1e-6)


def test_band_by_hand() -> None:
    found = band(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0]), 0.5)
    np.testing.assert_allclose(found, [0.65, 0.5, 0.35])
    found = band(np.array([1.0, 3.0]), np.array([3.0, 1.0]), 0.5)
    np.testing.assert_allclose(found, np.array([1.3, 0.7]) * 0.5 / 1.15)
    assert found @ [3.0, 1.0] == pytest.approx(2.0)
    assert band(np.array([2.0, 2.0]), np.array([1.0, 5.0]), 0.4).tolist() == [0.4, 0.4]


def test_logarithms_have_a_floor() -> None:
    found = logarithms(np.array([0.0, 2.0, 8.0]))
    np.testing.assert_allclose(found, np.log([1.0, 2.0, 8.0]))
    np.testing.assert_allclose(logarithms(np.array([0.5, 0.0])), np.log([0.5, 0.5]))


@pytest.mark.parametrize(
    ("weight", "entropy"),
    [
        ([[1.0, -1.0], [1.0, 1.0]], 1.0),
        ([[2.0, 0.0], [0.0, 0.0]], 0.0),
        ([[1.0, 1.0], [0.0, 0.0]], 0.5),  # two of four carry all: log 2 / log 4
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
    ],
)
def test_entropy_by_hand(weight: list[list[float]], entropy: float) -> None:
    found = Sizes.of(torch.tensor(weight), "l").entropy
    assert found == pytest.approx(entropy)


def test_the_layers_with_the_smallest_norm_lose_most(
    plan: Plan, ladder: Ladder
) -> None:
    found = WeightNorm().ratios(ladder, plan.bench)["norm"]
    norms = [
        float(weight(plan, at).norm()) / layer.numel**0.5
        for at, layer in enumerate(ladder.layers)
    ]
    assert np.argmin(norms) == found.argmax() and np.argmax(norms) == found.argmin()
    assert found.max() / found.min() == pytest.approx((1 + EPSILON) / (1 - EPSILON))
    check(ladder, found)


def test_entropy_agrees_with_its_definition(plan: Plan, ladder: Ladder) -> None:
    found = WeightEntropy().ratios(ladder, plan.bench)["entropy"]
    entropies = []
    for at in range(len(ladder.layers)):
        shares = weight(plan, at).square().flatten()
        shares /= shares.sum()
        entropies.append(float(-(shares * shares.log()).sum() / np.log(len(shares))))
    expected = band(np.array(entropies), ladder.numel, ladder.target)
    np.testing.assert_allclose(found, expected, atol=0.01)
    check(ladder, found)


def test_owl_agrees_with_its_definition(
    plan: Plan, ladder: Ladder, inputs: dict[str, torch.Tensor]
) -> None:
    found = Owl().ratios(ladder, plan.bench)["owl"]
    shares = []
    for positions in ladder.blocks.values():
        scores = torch.cat(
            [
                (
                    weight(plan, at).abs() * inputs[ladder.layers[at].name].norm(dim=0)
                ).flatten()
                for at in positions
            ]
        )
        shares.append(float((scores > 5 * scores.mean()).double().mean()))
    lifted = (np.array(shares) - min(shares)) / (max(shares) - min(shares)) * 0.16
    expected = ladder.target - (lifted - lifted.mean())  # both blocks are of one size
    for block, positions in ladder.blocks.items():
        np.testing.assert_allclose(found[positions], expected[block], atol=1e-6)
    assert found.max() - found.min() == pytest.approx(0.16)
    check(ladder, found)


@pytest.mark.parametrize(
    "formula", [HessianTrace(), HessianEigenvalue()], ids=lambda one: one.name
)
def test_hessians_agree_with_their_definition(
    formula: Any, plan: Plan, ladder: Ladder, inputs: dict[str, torch.Tensor]
) -> None:
    found = formula.ratios(ladder, plan.bench)[formula.name]
    worth = []
    for at, layer in enumerate(ladder.layers):
        hessian = inputs[layer.name].t() @ inputs[layer.name]
        value = hessian.diagonal().mean()
        if isinstance(formula, HessianEigenvalue):
            value = torch.linalg.eigvalsh(hessian)[-1]
        worth.append(float(value * weight(plan, at).square().mean()))
    expected = band(np.log(worth), ladder.numel, ladder.target)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    check(ladder, found)


def test_sensitivity_agrees_with_its_definition(
    plan: Plan, ladder: Ladder, inputs: dict[str, torch.Tensor]
) -> None:
    found = Sensitivity().ratios(ladder, plan.bench)["sensitivity"]
    half = Action.parse("magnitude(sparsity=0.5)")  # the level nearest to the target
    errors = []
    for at, layer in enumerate(ladder.layers):
        dense, read = weight(plan, at), inputs[layer.name]
        pruned = plan.bench.bank().get(layer, half).weight.double()
        lost = (read @ (dense - pruned).t()).square().sum()
        errors.append(float(lost / (read @ dense.t()).square().sum()))
    expected = band(np.array(errors), ladder.numel, ladder.target)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    check(ladder, found)


def test_the_largest_eigenvalue(rng: torch.Generator) -> None:
    inputs = torch.randn(50, 12, generator=rng) * torch.linspace(0.1, 3, 12)
    hessian = inputs.t() @ inputs
    expected = float(torch.linalg.eigvalsh(hessian)[-1])
    assert largest_eigenvalue(hessian) == pytest.approx(expected, rel=1e-4)
    diagonal = torch.diag(torch.tensor([1.0, 9.0, 4.0]))
    assert largest_eigenvalue(diagonal) == pytest.approx(9.0)
    assert largest_eigenvalue(torch.zeros(3, 3)) == 0.0


def test_they_are_registered() -> None:
    names = [formula.name for formula in register_formulas()]
    assert names == ["owl", "hessian_trace", "hessian_eigenvalue", "sensitivity"]
