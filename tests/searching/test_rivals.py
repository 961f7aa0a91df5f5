"""Rivals that need no search are the best of their sort, at the budget."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import config_of, write_text

from autoprune.errors import ConfigError
from autoprune.plugins import load_plugins
from autoprune.policy import Policy
from autoprune.searching.plan import Plan
from autoprune.searching.rivals import (
    RANDOM,
    as_random_rival,
    random_rival,
    rival_kind,
    solved_rivals,
)
from autoprune.searching.sensitivity import GRADIENTS, Sensitivities

BITS = "rtn(bits=[3, 4, 8], group=16)"
ZEROS = "magnitude(sparsity=[0.5, 0.9])"
BOTH = "magnitude(pattern=2:4) + rtn(bits=4, group=16)"
BLOCKS = [{"sites": "blocks.0.*", "actions": [BITS, ZEROS, BOTH]}]

Make = Callable[..., Plan]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Make:
    text = write_text(tmp_path_factory.mktemp("text"))

    def make(
        space: list[dict[str, Any]], budgets: dict[str, Any], **search: Any
    ) -> Plan:
        changes = {"space": space, "objective": {"budgets": budgets}}
        search = {"trials": 6, **search}
        config = config_of(tiny_checkpoint, text, **changes, search=search)
        return Plan.make(config, load_plugins())

    return make


def solved(plan: Plan) -> dict[str, Policy]:
    return dict(solved_rivals(plan, measured(plan), lambda _: None))


def methods(policy: Policy) -> set[str]:
    return {step.method for action in policy.values() for step in action.steps}


def test_each_rival_keeps_to_its_sort_and_to_the_budget(make: Make) -> None:
    plan = make(BLOCKS, {"size_bytes": "70%"})
    found = solved(plan)
    kinds = {name: rival_kind(name) for name in found}
    assert set(kinds.values()) == {
        "allocation only",
        "quantization only",
        "pruning only",
    }
    assert methods(found["quantization only"]) == {"rtn"}
    assert methods(found["pruning only"]) == {"magnitude"}
    assert all(plan.problem.within(policy) for policy in found.values())
    for name, policy in found.items():
        assert name in (kinds[name], f"{kinds[name]}, by blend")
        joint = sum(len(action.steps) > 1 for action in policy.values())
        assert joint == 0 or kinds[name] == "allocation only"


def measured(plan: Plan) -> Sensitivities:
    return Sensitivities(plan.bench, plan.bank, plan.problem.space)


def best_of_all(plan: Plan, kind: str) -> tuple[float, np.ndarray]:
    """Try all policies that are within the budgets; give the least sum of costs."""
    space = plan.problem.space
    costs = measured(plan).costs(kind)
    counts = [len(space.choices[site.name]) for site in space.sites]
    sums = [
        float(costs[np.arange(len(counts)), indices].sum())
        for indices in map(np.array, product(*map(range, counts)))
        if plan.problem.within(space.at(indices))
    ]
    return min(sums), costs


@pytest.mark.parametrize("kind", ["error", "fisher", "blend", "measured"])
def test_a_rival_is_the_best_of_all_that_are_within_the_budget(
    kind: str, make: Make
) -> None:
    plan = make(BLOCKS, {"size_bytes": "70%"}, sensitivity=kind)
    least, costs = best_of_all(plan, kind)
    chosen = plan.problem.space.index(solved(plan)["allocation only"])
    total = float(costs[np.arange(len(chosen)), chosen].sum())
    assert total == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize(("own", "other"), [GRADIENTS, GRADIENTS[::-1]])
def test_both_kinds_of_gradients_are_solved_for(
    own: str, other: str, make: Make
) -> None:
    """Each by its own costs; a policy that both lead to stands once."""
    plan = make(BLOCKS, {"size_bytes": "75%"}, sensitivity=own, rivals=["allocation"])
    least, costs = best_of_all(plan, other)
    told: list[str] = []
    top = np.max(costs, 1, where=np.isfinite(costs), initial=0)
    opposite = np.where(np.isinf(costs), np.inf, top[:, None] - costs)
    found = dict(solved_rivals(plan, measured(plan), told.append, known=opposite))
    assert told == [f"measuring sensitivities ({other}), for rivals"]
    assert list(found) == ["allocation only", f"allocation only, by {other}"]
    chosen = plan.problem.space.index(found[f"allocation only, by {other}"])
    total = float(costs[np.arange(len(chosen)), chosen].sum())
    assert total == pytest.approx(least, rel=1e-9)
    alike = dict(solved_rivals(plan, measured(plan), told.append, known=costs))
    assert list(alike) == ["allocation only"]
    assert alike["allocation only"] == found[f"allocation only, by {other}"]


def test_other_kinds_are_solved_for_alone(make: Make) -> None:
    told: list[str] = []
    plan = make(BLOCKS, {"size_bytes": "70%"}, sensitivity="error")
    found = solved_rivals(plan, measured(plan), told.append)
    assert told == ["measuring sensitivities (error), for rivals"]
    assert not any("by" in origin for origin, _ in found)


def test_other_kind_is_left_out_where_its_time_is_needed(make: Make) -> None:
    plan = make(BLOCKS, {"size_bytes": "70%"})
    told: list[str] = []
    asked = measured(plan)
    asked.seconds["fisher"] = 10.0
    found = dict(solved_rivals(plan, asked, told.append, spare_s=99.0))
    assert "measuring sensitivities (blend), for rivals" not in told
    assert not any("by" in origin for origin in found)
    solved_rivals(
        plan, asked, told.append, spare_s=101.0 + 10 * asked.seconds["fisher"]
    )
    assert told[-1] == "measuring sensitivities (blend), for rivals"


def test_what_is_measured_already_is_not_measured_again(make: Make) -> None:
    plan = make(BLOCKS, {"size_bytes": "70%"})
    space, told = plan.problem.space, []
    prefers = np.full((len(space.sites), max(map(len, space.choices.values()))), 9.0)
    for row, site in enumerate(space.sites):
        prefers[row, len(space.choices[site.name]) :] = np.inf
    prefers[:, 0] = 0.0  # the first choice, 3 bits, wherever there is one
    found = dict(solved_rivals(plan, measured(plan), told.append, known=prefers))
    chosen = found["allocation only"]
    assert {str(chosen[site]) for site in chosen if site.startswith("blocks.0.")} == {
        "rtn(bits=3, group=16)"
    }
    assert told == ["measuring sensitivities (blend), for rivals"]


def test_choices_of_one_sort_have_one_rival(make: Make) -> None:
    plan = make([{"sites": "blocks.*", "actions": [ZEROS]}], {"sparsity": 0.6})
    assert {rival_kind(name) for name in solved(plan)} == {"allocation only"}


def test_a_sort_that_is_never_so_small_has_no_rival(make: Make) -> None:
    space = [{"sites": "blocks.*", "actions": ["rtn(bits=8, group=16)", BOTH, ZEROS]}]
    found = solved(make(space, {"size_bytes": "45%"}))
    assert "quantization only" not in found
    assert "allocation only" in found


def test_without_a_budget_there_is_none(make: Make) -> None:
    assert solved(make(BLOCKS, {})) == {}


def test_only_those_that_are_named(make: Make) -> None:
    plan = make(BLOCKS, {"size_bytes": "70%"}, rivals=["pruning"])
    assert {rival_kind(name) for name in solved(plan)} == {"pruning only"}
    assert plan.fingerprint["rivals"] == ["pruning"]
    assert "rivals" not in make(BLOCKS, {"size_bytes": "70%"}).fingerprint


def test_the_random_rival_searches_among_the_same(make: Make) -> None:
    plan = make(BLOCKS, {"size_bytes": "70%"}, sampler="tpe", rivals=["random"])
    rival = random_rival(plan, 3)
    assert (rival.strategy.name, rival.config.search.trials) == ("random", 3)
    assert rival.bank is plan.bank and rival.problem is plan.problem
    assert not rival.proposals
    assert as_random_rival([]) == []
    assert rival_kind(RANDOM) == RANDOM
    assert rival_kind("random") is None


def test_a_random_search_is_no_rival_of_itself(make: Make) -> None:
    with pytest.raises(ConfigError, match="sampler random cannot have rival random"):
        make(BLOCKS, {"size_bytes": "70%"}, sampler="random", rivals=["random"])
