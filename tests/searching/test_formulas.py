"""Ratios land on levels, and the budget is met."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import config_of, write_text

from autoprune.errors import ConfigError, PluginError
from autoprune.plugins import Plugins, load_plugins
from autoprune.policy import DENSE, Action, Layer, Site
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.formulas import Ladder
from autoprune.searching.plan import Plan
from autoprune.searching.problem import Problem
from autoprune.searching.projection import SLACK
from autoprune.searching.rivals import UNIFORM
from autoprune.searching.space import SearchSpace

MODULES = ("layer_ratios", "layer_importance", "block_removal")
RATIOS = [
    "erk",
    "lamp",
    "global_magnitude",
    "atp",
    "entropy",
    "norm",
    "owl",
    "hessian_trace",
    "sensitivity",
    "alpha_pruning",
    "hessian_eigenvalue",
]
REMOVALS = ["block_similarity", "sleb"]
RANKINGS = ["grasp", "snip", "synflow"]  # over all layers: test_gradient_ratios
LEVELS = "magnitude(sparsity=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])"


def problem_of(
    texts: list[str], share: float | None, *, sites: int = 12, embedding: bool = True
) -> Problem:
    """Make a problem whose sites store what they keep; a budget as a share of dense."""
    actions = tuple(a for text in texts for a in Action.parse_all(text))
    places = [
        Site(f"blocks.{i}.q", (Layer(f"l{i}", (8, 8), "float32", i, "q", "x"),))
        for i in range(sites)
    ]
    if embedding:
        layer = Layer("embed", (8, 8), "float32", None, "embed", None)
        places.append(Site("embedding", (layer,)))
    choices = {site.name: actions for site in places}
    table = {site.name: np.array([_kept(a) for a in actions]) for site in places}
    budgets = (Budget("kept", share * 64.0 * len(places)),) if share else ()
    return Problem(
        SearchSpace(tuple(places), choices), (Prices("kept", table),), budgets
    )


def _kept(action: Action) -> float:
    sparsity = sum(float(dict(s.params).get("sparsity", 0.0)) for s in action.steps)
    return 64.0 * (1 - sparsity)


def test_the_target_is_the_ratio_that_meets_the_budget() -> None:
    ladder = Ladder.of(problem_of([LEVELS], 0.5, embedding=False))
    assert ladder.target == pytest.approx(0.5, abs=1e-6)
    # Twelve of thirteen equal sites may be pruned; the embedding stays as it is, dense.
    ladder = Ladder.of(problem_of(["dense", LEVELS], 0.5))
    assert ladder.target == pytest.approx(0.5 * 13 / 12, abs=1e-6)
    assert len(ladder.layers) == 12


@pytest.mark.parametrize("share", [0.2, 0.45, 0.62, 0.85])
def test_a_policy_takes_the_nearest_levels_and_meets_the_budget(share: float) -> None:
    problem = problem_of(["dense", LEVELS], share)
    ladder = Ladder.of(problem)
    spread = np.linspace(-0.15, 0.15, 12)
    ratios = dict(zip(ladder.layers, ladder.target + spread, strict=True))
    policy = ladder.policy(ratios)
    limit = problem.budgets[0].limit
    assert limit - 6.4 <= problem.price("kept", policy) <= limit  # one level of a site
    assert policy["embedding"] == DENSE
    for layer, ratio in ratios.items():
        found = 1 - _kept(policy[f"blocks.{layer.block}.q"]) / 64
        assert found == pytest.approx(min(max(ratio, 0), 0.9), abs=0.151)


def test_what_no_neighbouring_level_reaches_is_projected_further() -> None:
    problem = problem_of(["dense", LEVELS], 0.3, sites=4)
    ladder = Ladder.of(problem)  # the embedding has to be pruned as well
    assert ladder.target == pytest.approx(0.875, abs=1e-6)
    policy = ladder.policy(dict.fromkeys(ladder.layers, 0.1))
    assert problem.within(policy)


def test_levels_are_nearest_by_hand() -> None:
    problem = problem_of(["dense", "wanda(sparsity=[0.25, 0.75])"], 0.5, sites=3)
    ladder = Ladder.of(problem)
    ratios = dict(zip(ladder.layers, [0.12, 0.4, 0.9], strict=True))
    assert ladder.nearest(ratios).tolist() == [0, 1, 2, 0]


def test_a_site_takes_the_mean_of_its_layers() -> None:
    layers = tuple(
        Layer(f"l{i}", (rows, 8), "float32", 0, "q", "x")
        for i, rows in enumerate((8, 24))
    )
    site = Site("blocks.0.qkv", layers)
    actions = tuple(Action.parse_all("wanda(sparsity=[0.2, 0.4, 0.6])"))
    table = {site.name: np.array([80.0, 60.0, 40.0])}
    problem = Problem(
        SearchSpace((site,), {site.name: actions}),
        (Prices("kept", table),),
        (Budget("kept", 70.0),),
    )
    ladder = Ladder.of(problem)
    assert ladder.target == pytest.approx(0.3, abs=1e-6)
    # (8 * 0.1 + 24 * 0.7) / 32 = 0.55
    assert ladder.nearest(dict(zip(layers, [0.1, 0.7], strict=True))).tolist() == [2]


def test_the_family_with_the_most_levels_is_taken() -> None:
    texts = [
        "dense",
        "wanda(sparsity=[0.3, 0.5])",
        "sparsegpt(sparsity=[0.3, 0.5, 0.7], damping=0.1)",
        "sparsegpt(sparsity=0.5) + gptq(bits=4)",
        "wanda(pattern=2:4)",
    ]
    ladder = Ladder.of(problem_of(texts, 0.5, sites=2))
    assert ladder.zeros[0].tolist()[:6] == [0.0, np.inf, np.inf, 0.3, 0.5, 0.7]
    assert np.isinf(ladder.zeros[0, 6:]).all() and np.isinf(ladder.zeros[2]).all()


def test_dense_is_no_level_of_a_family_that_quantizes() -> None:
    problem = problem_of(["dense"], None, sites=2)
    steps = [Action.parse(f"wanda(sparsity={s}) + gptq(bits=4)") for s in (0.3, 0.5)]
    choices = {name: (DENSE, *steps) for name in problem.space.choices}
    table = {name: np.array([64.0, 12.0, 9.0]) for name in choices}
    quantized = Problem(
        SearchSpace(problem.space.sites, choices),
        (Prices("kept", table),),
        (Budget("kept", 90.0),),
    )
    assert Ladder.of(quantized).zeros[0].tolist() == [np.inf, 0.3, 0.5]


@pytest.mark.parametrize(
    ("texts", "share", "message"),
    [
        ([LEVELS], None, "divides a budget among the layers, found no budget"),
        (["dense", "rtn(bits=[3, 4])"], 1.0, "needs levels of sparsity, but no site"),
        (["wanda(pattern=[2:4, 1:4])"], 1.0, r"Give actions such as wanda\(sparsity="),
    ],
)
def test_spaces_without_levels_or_budget_are_told(
    texts: list[str], share: float | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Ladder.of(problem_of(texts, share))


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins([f"autoprune_plugins.{name}" for name in MODULES])


@pytest.fixture(scope="module")
def make(
    tiny_checkpoint: Path, plugins: Plugins, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Makes plans of a space of sparsities with proposals of formulas."""
    text = write_text(tmp_path_factory.mktemp("text"))

    def make(
        names: list[str], *, model: Path | str = tiny_checkpoint, **changes: Any
    ) -> Plan:
        settings = {
            "space": [{"actions": [LEVELS]}],
            "fuse": False,
            "objective": {"budgets": {"sparsity": 0.5}},
            "search": {"trials": 6, "proposals": names},
        } | changes
        return Plan.make(config_of(model, text, **settings), plugins)

    return make


def test_every_formula_is_registered(plugins: Plugins) -> None:
    assert sorted(plugins.objects["formulas"]) == sorted(RATIOS + REMOVALS + RANKINGS)
    for formula in plugins.objects["formulas"].values():
        assert formula.reference


def test_every_formula_meets_the_budget_and_follows_the_rivals(make: Any) -> None:
    plan = make(RATIOS)
    origins = [origin for origin, _ in plan.proposals]
    first = next(i for i, one in enumerate(origins) if not one.startswith(UNIFORM))
    own = origins[first:]
    assert [name.split()[0] for name in own] == [
        one for name in RATIOS for one in [name] * (2 if name == "atp" else 1)
    ]
    limit = plan.problem.budgets[0].limit
    for origin, policy in plan.proposals[first:]:
        total = plan.problem.price("sparsity", policy)
        assert limit * (1 - 5 * SLACK) <= total <= limit, origin
        assert len({str(action) for action in policy.values()}) > 1, origin


def test_no_formula_is_tried_unless_it_is_named(make: Any) -> None:
    plain, asked = make([]), make(["erk"])
    assert all(origin.startswith(UNIFORM) for origin, _ in plain.proposals)
    assert asked.proposals[: len(plain.proposals)] == plain.proposals
    assert asked.reference == plain.reference  # still the uniform policy
    assert "proposals" not in plain.fingerprint
    assert asked.fingerprint["proposals"] == ["erk"]


def test_an_unknown_formula_is_told_before_a_model_is_loaded(make: Any) -> None:
    with pytest.raises(PluginError, match=r"unknown formula 'lmap'\. Did you mean 'l"):
        make(["lmap"], model="nowhere/at/all")


def test_a_space_that_has_no_levels_is_told(make: Any) -> None:
    with pytest.raises(ConfigError, match="a formula needs levels of sparsity"):
        make(
            ["erk"],
            space=[{"actions": ["rtn(bits=[3, 4], group=16)"]}],
            objective={"budgets": {"size_bytes": "40%"}},
        )
