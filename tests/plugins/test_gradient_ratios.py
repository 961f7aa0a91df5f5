"""Rankings over all layers by gradients, against a full sort of every weight."""

from pathlib import Path

import numpy as np
import pytest
import torch
from autoprune_plugins import gradient_ratios
from autoprune_plugins.gradient_ratios import (
    GraspRatios,
    Ranking,
    Snip,
    SynFlowRatios,
    keys_of,
    register_formulas,
)
from tiny_runs import config_of, write_text
from torch import Tensor

from autoprune.compression.gradients import measure_gradients
from autoprune.errors import ModelError
from autoprune.models.flow import network_of_sizes, synaptic_flows
from autoprune.models.gradients import LayerGradients, TaskLoss
from autoprune.plugins import load_plugins
from autoprune.policy import Layer
from autoprune.searching.formulas import Formula, Ladder
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


def loss_of(plan: Plan) -> TaskLoss:
    return TaskLoss(plan.bench.task, plan.bench.tokenizer)


def measured(plan: Plan, ladder: Ladder, need: str) -> dict[Layer, LayerGradients]:
    bench = plan.bench
    ids = bench.splits["statistics"].ids
    needs = dict.fromkeys(ladder.layers, {need})
    return measure_gradients(
        bench.stitched.model, bench.inventory, loss_of(plan), ids, needs
    )


def sorted_shares(ladder: Ladder, scores: list[Tensor]) -> np.ndarray:
    """Give what each layer loses if all weights are sorted, without any cap."""
    owner = np.repeat(np.arange(len(scores)), [one.numel() for one in scores])
    order = np.argsort(torch.cat([s.flatten() for s in scores]).numpy(), kind="stable")
    gone = owner[order[: round(ladder.target * len(order))]]
    return np.bincount(gone, minlength=len(scores)) / ladder.numel


def check(ladder: Ladder, found: np.ndarray) -> None:
    mean = found @ ladder.numel / ladder.numel.sum()
    assert mean == pytest.approx(ladder.target, abs=1e-6)
    assert found.max() <= 1 - 0.25 * (1 - ladder.target) + 1e-9


def test_keys_are_in_the_order_of_scores(rng: torch.Generator) -> None:
    scores = torch.randn(40, 40, generator=rng).bfloat16().float()
    keys = keys_of(scores, "q")
    order = keys.flatten().argsort(stable=True)
    assert torch.equal(scores.flatten()[order], scores.flatten().sort().values)
    assert 0 <= int(keys.min()) and int(keys.max()) < 2**16
    with pytest.raises(ModelError, match=r"the scores of blocks\.1\.q hold NaN"):
        keys_of(torch.tensor([[1.0, torch.nan]]), "blocks.1.q")


def ranking(*scores: list[float], target: float) -> Ranking:
    return Ranking.of([keys_of(torch.tensor([s]), "q") for s in scores], target)


def test_a_ranking_by_hand() -> None:
    found = ranking([1.0, 2.0, 3.0, 9.0], [4.0, -5.0, 6.0, 7.0], target=0.5)
    assert found.shares.tolist() == [0.75, 0.25]
    limits = [int(keys_of(torch.tensor([[x]]), "q")) for x in (9.0, 4.0)]
    below = [int(keys_of(torch.tensor([[x]]), "q")) for x in (3.0, -5.0)]
    for limit, stays, goes in zip(found.limits, limits, below, strict=True):
        assert goes < limit <= stays


def test_no_layer_is_emptied() -> None:
    small, large = [0.01] * 20, [1.0] * 20
    found = ranking(small, large, target=0.5)
    np.testing.assert_allclose(found.shares, [0.875, 0.125])


def test_ties_are_shared_by_the_layers() -> None:
    found = ranking([1.0, 1.0, 5.0, 5.0], [1.0, 5.0, 5.0, 5.0], target=0.25)
    np.testing.assert_allclose(found.shares, [2 / 6, 1 / 6])  # 2 of 3, in parts
    assert ranking([1.0, 2.0], [3.0, 4.0], target=0.0).shares.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("formula", "need", "field"),
    [
        (Snip(), "gradient", "mean"),
        (GraspRatios(), "hessian_gradient", "hessian_gradient"),
    ],
    ids=["snip", "grasp"],
)
def test_rankings_agree_with_a_full_sort(
    formula: Formula, need: str, field: str, plan: Plan, ladder: Ladder
) -> None:
    found = formula.ratios(ladder, plan.bench)[formula.name]
    gradients, scores = measured(plan, ladder, need), []
    for layer in ladder.layers:
        score = plan.bench.stitched.dense_weight(layer) * getattr(
            gradients[layer], field
        )
        scores.append(score if formula.name == "grasp" else score.abs())
    check(ladder, found)
    expected = sorted_shares(ladder, scores)
    capped = expected > 0.87
    np.testing.assert_allclose(found[~capped], expected[~capped], atol=0.02)
    assert np.ptp(found) > 0.02


def test_synflow_in_one_round_is_a_full_sort(
    plan: Plan, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_ratios, "ROUNDS", 1)
    found = SynFlowRatios().ratios(ladder, plan.bench)["synflow"]
    check(ladder, found)
    roles = [layer.role for layer in ladder.layers]
    apart = [role in ("q_proj", "k_proj") for role in roles]
    assert set(found[apart].tolist()) == {ladder.target}
    model, ids = plan.bench.stitched.model, plan.bench.splits["statistics"].ids
    with network_of_sizes(model):
        flows = synaptic_flows(model, loss_of(plan), ids, ladder.layers)
    scores = [
        plan.bench.stitched.dense_weight(layer).abs() * flows[layer]
        for layer, out in zip(ladder.layers, apart, strict=True)
        if not out
    ]
    every = torch.cat([one.flatten() for one in scores])
    limit = every.kthvalue(round(ladder.target * len(every))).values
    expected = np.array([float((one <= limit).float().mean()) for one in scores])
    inner = expected < 0.87
    rest = found[[not out for out in apart]]
    np.testing.assert_allclose(rest[inner], expected[inner], atol=0.05)


def test_synflow_in_rounds_differs_and_leaves_the_model_alone(
    plan: Plan, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plan.bench.stitched.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {}
    for rounds in (1, 20):
        monkeypatch.setattr(gradient_ratios, "ROUNDS", rounds)
        found[rounds] = SynFlowRatios().ratios(ladder, plan.bench)["synflow"]
        check(ladder, found[rounds])
    assert not np.allclose(found[1], found[20], atol=1e-3)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_proposals_are_within_the_budget(plan: Plan) -> None:
    (origin, policy), *others = Snip().propose(plan.problem, plan.bench)
    assert origin == "snip" and not others
    measured = plan.bench.measure(
        policy, plan.bench.bank(), "fitness", metrics=["sparsity"]
    )
    assert measured.metrics["sparsity"] == pytest.approx(0.5, abs=0.02)


def test_they_are_registered() -> None:
    names = [formula.name for formula in register_formulas()]
    assert names == ["snip", "grasp", "synflow"]
