"""A configuration becomes a space with prices, budgets and goals."""

from pathlib import Path

import numpy as np
import pytest
from tiny_runs import WINDOW, write_text

from autoprune.config import ObjectiveConfig, Rule, TextConfig
from autoprune.errors import BudgetError, ConfigError
from autoprune.evaluation.workbench import Workbench
from autoprune.limits import Limit
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Policy
from autoprune.searching.formulate import (
    formulate,
    front_goals,
    goals_of,
    is_additive,
    make_objective,
)
from autoprune.searching.objective import Direction
from autoprune.searching.objective import Limit as Bound
from autoprune.searching.problem import Problem

RULES = [
    Rule(actions=["gptq(bits=[3, 4], group=16)", "wanda(sparsity=0.5)"]),
    Rule(sites="embedding", actions=["rtn(bits=8)", "dense"]),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Workbench:
    text = TextConfig(
        source=write_text(tmp_path_factory.mktemp("text")),
        window=WINDOW,
        statistics=2,
        fitness=2,
        choice=1,
        report=1,
    )
    return Workbench.open(
        load_plugins(),
        model=str(tiny_checkpoint),
        task="causal-lm",
        text=text,
        target="packed",
        seed=0,
    )


def limits(**texts: str | float) -> dict[str, Limit]:
    return {name: Limit.parse(text) for name, text in texts.items()}


def some_policies(problem: Problem, count: int = 8) -> list[Policy]:
    rng = np.random.default_rng(0)
    sizes = [len(problem.space.choices[site.name]) for site in problem.space.sites]
    return [problem.space.at(rng.integers(sizes)) for _ in range(count)]


def test_rules_become_choices(bench: Workbench) -> None:
    problem = formulate(bench, RULES, {})
    choices = problem.space.choices
    assert list(choices) == [site.name for site in bench.inventory.sites]
    assert [str(action) for action in choices["blocks.1.down"]] == [
        "gptq(bits=3, group=16)",
        "gptq(bits=4, group=16)",
        "wanda(sparsity=0.5)",
    ]
    assert choices["embedding"][1] == DENSE
    assert problem.budgets == ()
    assert [prices.metric for prices in problem.prices] == ["size_bytes"]


def test_two_spellings_of_an_action_are_one(bench: Workbench) -> None:
    spellings = ["rtn(bits=4,group=16)", "rtn(symmetric=false, group=16, bits=4)"]
    rules = [Rule(actions=[*spellings, "dense"])]
    choices = formulate(bench, rules, {}).space.choices["blocks.0.o"]
    assert [str(action) for action in choices] == ["rtn(bits=4, group=16)", "dense"]


def test_what_a_site_refuses_is_left_out_there(bench: Workbench) -> None:
    """128 columns can be cut in groups of 128, 64 cannot."""
    rules = [Rule(actions=["rtn(bits=4, group=128)", "dense"])]
    problem = formulate(bench, rules, {})
    assert problem.space.choices["blocks.0.o"] == (DENSE,)
    assert len(problem.space.choices["blocks.0.down"]) == 2
    refused = {site for site, _, _ in problem.space.refused}
    assert "blocks.0.qkv" in refused and "blocks.0.down" not in refused


@pytest.mark.parametrize("metric", ["size_bytes", "bits_per_weight", "sparsity"])
def test_a_policy_within_the_budget_measures_within_the_limit(
    metric: str, bench: Workbench
) -> None:
    """And the sum of prices is as exact as the metric itself."""
    texts = {"size_bytes": "55%", "bits_per_weight": 12.0, "sparsity": 0.2}
    problem = formulate(bench, RULES, limits(**{metric: texts[metric]}))
    bound = problem.budgets[-1]
    assert bound.metric == metric
    assert problem.projection is not None
    dense = bench.dense_metrics("fitness")["size_bytes"]
    limit = {"size_bytes": 0.55 * dense, "bits_per_weight": 12, "sparsity": 0.2}[metric]
    inside = []
    for policy in some_policies(problem, 24):
        found = bench.measure(policy, bench.bank(), "fitness", metrics=[metric])
        value = found.metrics[metric]
        if problem.within(policy):
            assert value >= limit if metric == "sparsity" else value <= limit
        inside.append(problem.within(policy))
    assert any(inside) and not all(inside)


def test_the_budget_that_is_filled_up_comes_first(bench: Workbench) -> None:
    found = limits(gflop_per_token="90%", sparsity=0.1, size_bytes="60%", kl=0.2)
    problem = formulate(bench, RULES, found)
    named = ["size_bytes", "gflop_per_token", "sparsity"]
    assert [budget.metric for budget in problem.budgets] == named
    assert [prices.metric for prices in problem.prices] == named


def test_a_ratio_limits_bytes(bench: Workbench) -> None:
    problem = formulate(bench, RULES, limits(compression_ratio=1.8))
    inside = [policy for policy in some_policies(problem, 24) if problem.within(policy)]
    assert inside
    for policy in inside:
        found = bench.measure(
            policy, bench.bank(), "fitness", metrics=["compression_ratio"]
        )
        assert found.metrics["compression_ratio"] >= 1.8


def test_what_adds_up_is_known(bench: Workbench) -> None:
    added = {name for name in bench.metrics if is_additive(bench, name)}
    assert added == {
        "size_bytes",
        "compression_ratio",
        "bits_per_weight",
        "sparsity",
        "model_sparsity",
        "gflop_per_token",
    }
    with pytest.raises(ConfigError, match="unknown metric 'sparcity'. Did you mean"):
        is_additive(bench, "sparcity")


@pytest.mark.parametrize(
    ("found", "kind", "message"),
    [
        (
            limits(size_bytes="10%"),
            BudgetError,
            r"size_bytes <= 36379.2; .* is \d+ \(dense: 363792\). Relax the budget",
        ),
        (
            limits(sparsity=0.7),
            BudgetError,
            r"sparsity >= 0.7; .* reach is 0.5 \(dense: 0\)",
        ),
        (
            limits(gflop_per_token=1e-6),
            BudgetError,
            r"gflop_per_token <= 1e-06; .* reach is \S+ \(dense: 0.00018",
        ),
        (
            limits(compression_ratio=9.0),
            BudgetError,
            r"compression_ratio >= 9; .* reach is \d\.\d+ \(dense: 1\)",
        ),
        (
            limits(model_sparsity="2x"),
            ConfigError,
            "model_sparsity is 2 x dense, but the dense model's model_sparsity is 0",
        ),
        (
            limits(bits_per_wieght=4),
            ConfigError,
            "unknown metric 'bits_per_wieght'. Did you mean 'bits_per_weight'",
        ),
    ],
    ids=["size", "sparsity", "compute", "ratio", "relative", "unknown"],
)
def test_impossible_budgets(
    found: dict[str, Limit], kind: type[Exception], message: str, bench: Workbench
) -> None:
    with pytest.raises(kind, match=message):
        formulate(bench, RULES, found)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (["wnada"], r"space, sites 'blocks\.\*': unknown method 'wnada'. Did you mean"),
        (["wanda(sparsity=1.2)"], "lies between 0 and 1, found 1.2"),
        (["wanda(pattern=4:2)"], "0 < keep < of <= 64.*found '4:2'"),
        (["rtn(bits=[4, 8"], r"cannot read 'rtn\(bits=\[4, 8'"),
        (
            ["rtn(bits=4, group=48)"],
            r"none of the 8 sites .* can do 'rtn\(bits=4, group=48\)'; at .*: .*48",
        ),
    ],
)
def test_impossible_actions(actions: list[str], message: str, bench: Workbench) -> None:
    with pytest.raises(ConfigError, match=message):
        formulate(bench, [Rule(actions=actions)], {})


def test_limits_that_do_not_add_up_are_left_to_trials(bench: Workbench) -> None:
    dense = bench.dense_metrics("fitness")
    wanted = ObjectiveConfig(
        metric="size_bytes",
        budgets=limits(perplexity="110%", kl=0.3, sparsity=0.2),
    )
    objective = make_objective(bench, wanted)
    assert objective.goals == (("size_bytes", "minimize"),)
    assert objective.limits == (
        Bound("perplexity", 1.1 * dense["perplexity"], "minimize"),
        Bound("kl", 0.3, "minimize"),
    )


def directions(bench: Workbench) -> dict[str, Direction]:
    return {name: metric.direction for name, metric in bench.metrics.items()}


@pytest.mark.parametrize(
    ("given", "goals"),
    [
        ({}, (("reward", "maximize"),)),
        ({"reward": "logs"}, (("reward", "maximize"),)),
        ({"budgets": limits(size_bytes="50%")}, (("kl", "minimize"),)),
        ({"metric": "sparsity"}, (("sparsity", "maximize"),)),
        (
            {"pareto": ["perplexity", "compression_ratio"]},
            (("perplexity", "minimize"), ("compression_ratio", "maximize")),
        ),
    ],
    ids=["nothing", "reward", "budget", "metric", "pareto"],
)
def test_what_is_wanted(
    given: dict[str, object],
    goals: tuple[tuple[str, str], ...],
    bench: Workbench,
) -> None:
    wanted = ObjectiveConfig(**given)  # type: ignore[arg-type]
    assert goals_of(directions(bench), wanted) == goals


def test_an_unknown_goal_is_named(bench: Workbench) -> None:
    with pytest.raises(ConfigError, match="unknown metric 'perplexty'. Did you mean"):
        goals_of(directions(bench), ObjectiveConfig(pareto=["kl", "perplexty"]))


def test_the_front_is_of_size_and_divergence_unless_named() -> None:
    both = (("sparsity", "maximize"), ("kl", "minimize"))
    plain = (("size_bytes", "minimize"), ("kl", "minimize"))
    assert front_goals(both) == both  # type: ignore[arg-type]
    assert front_goals((("reward", "maximize"),)) == plain
