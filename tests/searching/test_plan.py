"""A plan is all that a run needs before its first trial."""

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import config_of, write_text

from autoprune.errors import ConfigError, PluginError
from autoprune.plugins import load_plugins
from autoprune.policy import Policy
from autoprune.searching.fingerprint import differences
from autoprune.searching.plan import Plan

LEVELS = [{"actions": ["rtn(bits=[3, 4, 8], group=16)"]}]
FOUR, EIGHT = "rtn(bits=4, group=16)", "rtn(bits=8, group=16)"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path, text: str) -> Any:
    """Makes plans; settings replace those of the small space."""

    def make(**changes: Any) -> Plan:
        return Plan.make(config_of(tiny_checkpoint, text, **changes), load_plugins())

    return make


def bits(policy: Policy | None) -> set[str]:
    assert policy is not None
    return {str(a) for site, a in policy.items() if site.startswith("blocks")}


def test_pairs_are_all_that_trials_can_ask_for(make: Any) -> None:
    plan = make()
    for site in plan.problem.space.sites:
        for action in plan.problem.space.choices[site.name]:
            assert {(layer, action) for layer in site.layers} <= set(plan.pairs)
    plan.bank.make(plan.pairs)
    for _, policy in plan.proposals:
        assert plan.bank.missing(plan.bench.per_layer(policy).items()) == []


@pytest.mark.parametrize(
    ("objective", "found"),
    [
        ({}, [FOUR]),  # in the middle
        ({"budgets": {"size_bytes": "90%"}}, [EIGHT]),
        ({"budgets": {"size_bytes": 142_500}}, [FOUR, EIGHT]),  # a mix that fits
    ],
    ids=["free", "wide", "between"],
)
def test_the_reference_is_the_uniform_policy_nearest_to_the_budget(
    objective: dict[str, Any], found: list[str], make: Any
) -> None:
    plan = make(space=LEVELS, objective=objective)
    assert bits(plan.reference) == set(found)
    assert plan.bank.reference == plan.bench.per_layer(plan.reference)


def test_there_need_be_no_reference(make: Any) -> None:
    assert make(bank="dense").reference is None
    apart = [
        {"sites": "blocks.0.*", "actions": ["rtn(bits=[3, 4], group=16)"]},
        {"sites": "blocks.1.*", "actions": ["rtn(bits=[2, 8], group=16)"]},
    ]
    plan = make(space=apart)  # no action that all sites offer
    assert plan.proposals == ()
    assert plan.reference is None
    assert plan.bank.name == plan.bench.bank().name


def test_finalists_are_compared_by_the_goal(make: Any) -> None:
    for objective, sign, name in (
        ({"metric": "kl"}, 1, "kl"),
        ({"metric": "sparsity"}, -1, "sparsity"),
    ):
        plan = make(objective=objective)
        measured = plan.bench.measure(plan.proposals[0][1], plan.bank, "choice")
        assert plan.cost("choice")(measured) == sign * measured.metrics[name]


@pytest.mark.parametrize(
    "objective", [{}, {"pareto": ["kl", "size_bytes"]}, {"reward": "logs"}]
)
def test_finalists_of_a_front_are_compared_by_the_reward(
    objective: dict[str, Any], make: Any
) -> None:
    plan = make(objective=objective)
    cost = plan.cost("choice")
    measured = plan.bench.measure(plan.proposals[0][1], plan.bank, "choice")
    dense = plan.bench.dense_metrics("choice")
    ratio = {n: measured.metrics[n] / dense[n] for n in ("perplexity", "size_bytes")}
    expected = math.log(ratio["perplexity"]) + 0.2 * math.log(ratio["size_bytes"])
    assert cost(measured) == pytest.approx(expected)
    measured.metrics["perplexity"] = math.inf
    assert cost(measured) == math.inf


def test_what_diverged_costs_everything(make: Any) -> None:
    plan = make(objective={"metric": "kl"})
    measured = plan.bench.measure(plan.proposals[0][1], plan.bank, "choice")
    measured.metrics["kl"] = math.nan
    assert plan.cost("choice")(measured) == math.inf


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"search": {"trials": 6, "seed": 1}}, "seed"),
        ({"search": {"trials": 6, "sampler": "tpe"}}, "sampler"),
        ({"space": LEVELS}, "space"),
        ({"bank": "dense"}, "bank"),
        ({"export": "transformers", "objective": {}}, "export"),
        ({"objective": {"budgets": {"size_bytes": "41%"}}}, "objective.budgets"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_fingerprint_tells_what_differs(
    changes: dict[str, Any], key: str, make: Any
) -> None:
    lines = differences(make().fingerprint, make(**changes).fingerprint)
    assert any(line.startswith(key) for line in lines), lines


def test_the_fingerprint_leaves_out_how_long_a_search_goes(make: Any) -> None:
    longer = make(search={"trials": 99, "budget": "8h", "finalists": 7})
    assert differences(make().fingerprint, longer.fingerprint) == []
    assert longer.fingerprint["methods"].keys() == {"gptq", "magnitude", "rtn"}


def test_a_store_that_is_too_small(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_STORE_GB", "0.0001")
    with pytest.raises(ConfigError, match="cap of the store is 0.0 GB.*AUTOPRUNE_STOR"):
        make()


def test_names_are_looked_up_before_a_model_is_loaded() -> None:
    for changes, message in (
        ({"search": {"trials": 1, "sampler": "tpee"}}, "unknown sampler 'tpee'"),
        ({"objective": {"reward": "log"}}, "unknown reward 'log'"),
        ({"export": "paked"}, "unknown exporter 'paked'"),
    ):
        config = config_of("/no/such/model", "builtin", **changes)
        with pytest.raises(PluginError, match=message):
            Plan.make(config, load_plugins())


def test_a_wrong_weight_is_told_before_the_first_trial(make: Any) -> None:
    objective = {"reward": "logs", "weights": {"perplexty": 1.0}}
    with pytest.raises(ConfigError, match="reward 'logs': unknown metric 'perplexty'"):
        make(objective=objective)
