"""A policy is measured once, window by window, and its reward beside it."""

import math
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import config_of, write_text

from autoprune.plugins import load_plugins
from autoprune.policy import Policy
from autoprune.searching.plan import Plan
from autoprune.searching.trial import LocalEvaluator


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Plan:
    text = write_text(tmp_path_factory.mktemp("text"))
    return Plan.make(config_of(tiny_checkpoint, text), load_plugins())


def test_the_reward_stands_among_the_metrics(plan: Plan) -> None:
    policy = plan.proposals[0][1]
    metrics = plan.evaluator().measure(policy).metrics
    expected = plan.bench.measure(policy, plan.bank, "fitness").metrics
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["reward"] == pytest.approx(
        -math.log1p(metrics["quality_drop"])
        + 0.2 * math.log(metrics["compression_ratio"])
    )


def test_the_dense_model_has_no_reward_but_zero(plan: Plan) -> None:
    dense = plan.evaluator().measure(plan.bench.dense_policy())
    assert dense.metrics["reward"] == 0.0


def test_without_a_reward_there_is_none(plan: Plan) -> None:
    evaluator = LocalEvaluator(plan.bench, plan.bank, plan.problem.space)
    metrics = evaluator.measure(plan.proposals[0][1]).metrics
    assert metrics.keys() == plan.bench.metrics.keys()


def test_windows_that_are_known_are_not_measured_again(plan: Plan) -> None:
    evaluator, policy = plan.evaluator(), plan.proposals[0][1]
    first = evaluator.measure(policy, 1)
    assert len(first.windows) == 1 and first.metrics["kl"] == first.windows[0]
    whole = evaluator.measure(policy)
    assert whole.windows[0] == first.windows[0] and len(whole.windows) == 2
    assert whole.metrics["kl"] == pytest.approx(np.mean(whole.windows))
    again = evaluator.measure(policy)
    assert again.windows == whole.windows and again.metrics == whole.metrics
    fresh = plan.evaluator().measure(policy)
    assert fresh.metrics["kl"] == pytest.approx(whole.metrics["kl"], rel=1e-5)


def test_blocks_before_the_first_change_are_not_run_again(plan: Plan) -> None:
    space = plan.problem.space
    start = plan.proposals[0][1]
    last = next(s for s in reversed(space.sites) if len(space.choices[s.name]) > 1)
    action = next(a for a in space.choices[last.name] if a != start[last.name])
    changed = Policy({**start, last.name: action})
    plan.bank.make(plan.pairs)  # which runs blocks too
    evaluator, runs = plan.evaluator(), []
    model = plan.bench.stitched.model
    first = model.get_submodule(last.layers[0].name.replace(".1.", ".0."))
    handle = first.register_forward_hook(lambda *_: runs.append(1))
    try:
        evaluator.measure(start)
        ran = len(runs)
        near = evaluator.measure(changed, near=start)
        assert len(runs) == ran > 0  # the first block answered from memory
        alone = plan.evaluator().measure(changed)
        assert len(runs) == 2 * ran
    finally:
        handle.remove()
    assert near.windows == alone.windows and near.metrics == alone.metrics


def test_slopes_are_taken_on_other_windows_each_time(plan: Plan) -> None:
    evaluator, policy = plan.evaluator(), plan.proposals[0][1]
    windows = [
        evaluator.slopes(policy, tokens=32, draws=1, turn=turn).windows
        for turn in range(3)
    ]
    assert windows == [(0,), (1,), (0,)]
    found = evaluator.slopes(policy, tokens=64, draws=2, turn=0)
    now = plan.problem.space.index(policy)
    rows = np.arange(len(now))
    assert found.windows == (0, 1)
    assert not found.slope[rows, now].any() and not found.curvature[rows, now].any()
    free = [
        len(plan.problem.space.choices[s.name]) > 1 for s in plan.problem.space.sites
    ]
    assert (np.where(np.isfinite(found.curvature), found.curvature, 0) >= 0).all()
    assert np.abs(np.where(np.isfinite(found.slope), found.slope, 0)).max(1)[free].all()
