"""A problem on disk is the problem of the run, in every additive metric."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import config_of, write_text

from autoprune.errors import BudgetError, ConfigError, RunError
from autoprune.evaluation.metric import Evidence
from autoprune.limits import Limit
from autoprune.plugins import load_plugins
from autoprune.searching.formulate import priced
from autoprune.searching.frozen import FILE, FrozenProblem
from autoprune.searching.plan import Plan

SPACE = [
    {"actions": ["rtn(bits=[3, 4, 8], group=16)", "magnitude(sparsity=0.5)"]},
    {"sites": "embedding", "actions": ["rtn(bits=8, group=16)", "dense"]},
    {"sites": "blocks.0.o", "actions": ["dense"]},
]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Plan:
    text = write_text(tmp_path_factory.mktemp("text"))
    return Plan.make(config_of(tiny_checkpoint, text, space=SPACE), load_plugins())


@pytest.fixture(scope="module")
def costs(plan: Plan) -> Any:
    """A cost for every choice; infinite where a site has fewer."""
    space = plan.problem.space
    found = np.full((len(space.sites), 4), np.inf)
    for row, site in enumerate(space.sites):
        count = len(space.choices[site.name])
        found[row, :count] = np.arange(count) / 3 + row
    return found


@pytest.fixture(scope="module")
def frozen(plan: Plan, costs: Any) -> FrozenProblem:
    return FrozenProblem.of(plan.bench, plan.problem.space, costs)


def test_every_metric_whose_limit_is_a_line_is_priced(frozen: FrozenProblem) -> None:
    assert frozen.scales.keys() == {
        "size_bytes",
        "bits_per_weight",
        "sparsity",
        "model_sparsity",
        "gflop_per_token",
    }
    assert {entry.metric for entry in frozen.problem.prices} == frozen.scales.keys()
    assert frozen.problem.budgets == ()


def test_it_comes_back_as_it_was_written(
    frozen: FrozenProblem, costs: Any, tmp_path: Path
) -> None:
    frozen.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    again = FrozenProblem.read(tmp_path)
    space = frozen.problem.space
    assert again.problem.space.sites == space.sites
    assert again.problem.space.choices == space.choices
    assert again.problem.space.fingerprint == space.fingerprint
    assert again.scales == frozen.scales
    assert np.array_equal(again.costs, costs)
    for one, other in zip(again.problem.prices, frozen.problem.prices, strict=True):
        assert one.metric == other.metric
        assert np.array_equal(one.padded(space), other.padded(space))


def test_it_comes_back_without_costs(frozen: FrozenProblem, tmp_path: Path) -> None:
    replace(frozen, costs=None).write(tmp_path)
    assert FrozenProblem.read(tmp_path).costs is None


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("size_bytes", "40%"),
        ("size_bytes", "100 kB"),
        ("bits_per_weight", 8),
        ("bits_per_weight", "0.3x"),
        ("sparsity", 0.4),
        ("model_sparsity", 0.3),
        ("gflop_per_token", "70%"),
    ],
)
def test_budgets_are_those_of_a_run(
    metric: str, text: str, plan: Plan, frozen: FrozenProblem
) -> None:
    limits = {metric: Limit.parse(text)}
    (expected,) = priced(plan.bench, plan.problem.space, limits).budgets
    (found,) = frozen.within(limits).budgets
    assert found.metric == metric
    exact = metric == "size_bytes"
    assert found.limit == pytest.approx(expected.limit, rel=0 if exact else 1e-12)


def test_several_budgets_are_kept_in_their_order(frozen: FrozenProblem) -> None:
    limits = {"sparsity": Limit.parse(0.1), "size_bytes": Limit.parse("50%")}
    found = frozen.within(limits)
    assert [budget.metric for budget in found.budgets] == ["sparsity", "size_bytes"]
    assert found.space is frozen.problem.space


def test_sums_of_prices_are_turned_back_into_metrics(
    plan: Plan, frozen: FrozenProblem
) -> None:
    rng = np.random.default_rng(0)
    space, scene = frozen.problem.space, plan.bench.scene()
    counts = [len(space.choices[site.name]) for site in space.sites]
    for _ in range(5):
        policy = space.at(rng.integers(counts))
        evidence = Evidence(scene, plan.bench.storages(policy))
        for name in frozen.scales:
            found = frozen.value(name, frozen.problem.price(name, policy))
            plain = plan.bench.metric(name).measure(evidence)
            if name == "size_bytes":  # some bytes a tensor are kept free in the header
                assert plain <= found <= plain + 16 * 4 * len(scene.layers)
                continue
            assert found == pytest.approx(plain, rel=1e-9, abs=1e-12), name


def test_the_dense_model_stands_with_its_own_figures(
    plan: Plan, frozen: FrozenProblem
) -> None:
    dense = {name: scale[0] for name, scale in frozen.scales.items()}
    known = plan.bench.dense_metrics("fitness")
    assert dense == {name: known[name] for name in dense}


def test_limits_that_make_no_sense(frozen: FrozenProblem) -> None:
    for name, text, message in (
        ("sise_bytes", "40%", "unknown additive metric 'sise_bytes'. Did you mean"),
        ("kl", 0.1, "unknown additive metric 'kl'"),
        ("compression_ratio", 4, "unknown additive metric 'compression_ratio'"),
        ("sparsity", "50%", "sparsity is 0.5 x dense, but the dense model's .* is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            frozen.within({name: Limit.parse(text)})


def test_a_budget_out_of_reach_is_told_in_the_unit_of_its_metric(
    frozen: FrozenProblem,
) -> None:
    for name, text, message in (
        (
            "size_bytes",
            "1%",
            r"budget size_bytes <= 3637\.92; .* reach is 89599 \(dense: 363",
        ),
        (
            "bits_per_weight",
            5,
            r"bits_per_weight <= 5; .* reach is 6\.67708 \(dense: 3",
        ),
        ("sparsity", 0.9, r"sparsity >= 0\.9; .* reach is 0\.4\d+ \(dense: 0\)"),
    ):
        with pytest.raises(BudgetError, match=f"no policy of the space .*{message}"):
            frozen.within({name: Limit.parse(text)})


def test_a_file_that_is_missing_or_damaged_is_told(
    frozen: FrozenProblem, tmp_path: Path
) -> None:
    advice = "It is written when a search begins: give the same search command again"
    with pytest.raises(RunError, match=rf"cannot read .*{FILE}: .*No such.*{advice}"):
        FrozenProblem.read(tmp_path)
    frozen.write(tmp_path)
    whole = json.loads((tmp_path / FILE).read_text())
    site = whole["sites"][0]
    for damaged in (
        "{",
        json.dumps({name: x for name, x in whole.items() if name != "scales"}),
        json.dumps(whole | {"sites": [site | {"layers": [{"name": "x"}]}]}),
        json.dumps(whole | {"scales": {"size_bytes": [1.0]}}),
    ):
        (tmp_path / FILE).write_text(damaged)
        with pytest.raises(RunError, match=f"cannot read .*{advice}"):
            FrozenProblem.read(tmp_path)


def test_what_cannot_be_written_is_told(frozen: FrozenProblem, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"cannot write .*missing/{FILE}"):
        frozen.write(tmp_path / "missing")


def test_infinite_costs_are_no_numbers_in_the_file(
    frozen: FrozenProblem, tmp_path: Path
) -> None:
    frozen.write(tmp_path)
    text = (tmp_path / FILE).read_text()
    assert "Infinity" not in text
    rows = json.loads(text)["costs"]
    assert frozen.costs is not None
    expected = [[x if math.isfinite(x) else None for x in r] for r in frozen.costs]
    assert rows == expected
