"""A policy is measured once, and its reward beside it."""

import math
from pathlib import Path

import pytest
from tiny_runs import config_of, write_text

from autoprune.plugins import load_plugins
from autoprune.searching.plan import Plan
from autoprune.searching.trial import Evaluator


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Plan:
    text = write_text(tmp_path_factory.mktemp("text"))
    return Plan.make(config_of(tiny_checkpoint, text), load_plugins())


def test_the_reward_stands_among_the_metrics(plan: Plan) -> None:
    policy = plan.proposals[0][1]
    evaluate = Evaluator(plan.bench, plan.bank, reward=plan.reward)
    metrics = evaluate(policy)
    expected = plan.bench.measure(policy, plan.bank, "fitness").metrics
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["reward"] == pytest.approx(
        -math.log1p(metrics["quality_drop"])
        + 0.2 * math.log(metrics["compression_ratio"])
    )


def test_the_dense_model_has_no_reward_but_zero(plan: Plan) -> None:
    evaluate = Evaluator(plan.bench, plan.bank, reward=plan.reward)
    assert evaluate(plan.bench.dense_policy())["reward"] == 0.0


def test_without_a_reward_there_is_none(plan: Plan) -> None:
    evaluate = Evaluator(plan.bench, plan.bank)
    assert evaluate(plan.proposals[0][1]).keys() == plan.bench.metrics.keys()


def test_a_policy_is_measured_once(plan: Plan) -> None:
    evaluate = Evaluator(plan.bench, plan.bank)
    policy, other = plan.proposals[0][1], plan.proposals[1][1]
    first = evaluate.measure(policy)
    assert evaluate.measure(other) is not first
    assert evaluate.measure(policy) is first
    assert first.quality is not None


def test_every_split_has_figures_of_its_own(plan: Plan) -> None:
    policy = plan.proposals[0][1]
    fitness = Evaluator(plan.bench, plan.bank)(policy)
    choice = Evaluator(plan.bench, plan.bank, split="choice")(policy)
    assert fitness["kl"] != choice["kl"]
    assert fitness["size_bytes"] == choice["size_bytes"]
