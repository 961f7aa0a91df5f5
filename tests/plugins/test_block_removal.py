"""Blocks removed by measurement and by similarity, against torch's own models."""

from copy import deepcopy
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from autoprune_plugins.block_removal import (
    DROP,
    TOKENS,
    Removal,
    block_influences,
    growths,
    register_formulas,
)
from tiny_models import tiny
from tiny_runs import config_of, write_text
from transformers import PreTrainedTokenizerFast

from autoprune.errors import BudgetError, ConfigError
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Policy
from autoprune.searching.plan import Plan

BLOCKS = 5
WHOLE = [{"sites": "blocks.*.block", "actions": ["drop", "dense"]}]
PARTS = [
    {"sites": "blocks.*.attention", "actions": ["drop", "dense"]},
    {"sites": "blocks.*.mlp", "actions": ["drop", "dense"]},
]
NAMES = ["sleb", "block_similarity"]


def five_blocks() -> Any:
    return tiny(
        "llama", vocab_size=256, num_hidden_layers=BLOCKS, initializer_range=0.2
    )


def outputs(model: Any, block: int) -> list[torch.Tensor]:
    """Give the weights that write to the residual stream."""
    layers = model.model.layers[block]
    return [layers.self_attn.o_proj.weight.data, layers.mlp.down_proj.weight.data]


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Any:
    """Makes plans of models of five blocks."""
    text = write_text(tmp_path_factory.mktemp("text"))
    plugins = load_plugins()

    def make(model: Any = None, **changes: Any) -> Plan:
        folder = tmp_path_factory.mktemp("model")
        (model or five_blocks()).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        settings = {
            "space": WHOLE,
            "objective": {"budgets": {"size_bytes": "70%"}},
            "search": {"trials": 4, "proposals": NAMES},
        } | changes
        return Plan.make(config_of(folder, text, **settings), plugins)

    return make


@pytest.fixture(scope="module")
def plan(make: Any) -> Plan:
    found: Plan = make()
    return found


def proposed(plan: Plan, name: str) -> Policy:
    return next(policy for origin, policy in plan.proposals if origin == name)


def gone(policy: Policy) -> set[int]:
    return {
        int(site.split(".")[1]) for site, action in policy.items() if action == DROP
    }


def kl_without(plan: Plan, blocks: set[int]) -> float:
    """Take blocks out of torch's list, and compare distributions in double."""
    plan.bench.stitched.restore()
    dense: Any = plan.bench.stitched.model
    cut = deepcopy(dense)
    kept = [b for i, b in enumerate(dense.model.layers) if i not in blocks]
    cut.model.layers = torch.nn.ModuleList(kept)
    cut.config.num_hidden_layers = len(kept)
    ids = plan.bench.splits["fitness"].ids
    assert ids.numel() <= TOKENS  # all are measured
    with torch.no_grad():
        one, other = (
            m(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            for m in (dense, cut)
        )
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_they_are_registered() -> None:
    found = {one.name: one.reference for one in register_formulas()}
    assert list(found) == NAMES and all(found.values())


def test_growths_are_those_of_models_without_the_blocks(plan: Plan) -> None:
    removal = Removal.of(plan.problem, "sleb")
    rows = list(removal.dropped)
    assert len(rows) == BLOCKS
    bank = plan.bench.bank()
    first = growths(removal, plan.bench, bank, gone=[], tried=rows)
    alone = [kl_without(plan, {block}) for block in range(BLOCKS)]
    np.testing.assert_allclose(first, alone, rtol=1e-3, atol=1e-5)
    assert min(alone) > 0.01  # every block matters
    left = [rows[1], rows[3], rows[4]]
    second = growths(removal, plan.bench, bank, gone=[rows[0], rows[2]], tried=left)
    base = kl_without(plan, {0, 2})
    expected = [kl_without(plan, {0, 2, block}) - base for block in (1, 3, 4)]
    np.testing.assert_allclose(second, expected, rtol=1e-3, atol=1e-4)
    assert not plan.bench.stitched.changes({la: DENSE for la in plan.bench.layers})


def test_sleb_is_greedy_over_all_blocks(plan: Plan) -> None:
    found = gone(proposed(plan, "sleb"))
    taken: set[int] = set()
    while len(taken) < len(found):
        left = set(range(BLOCKS)) - taken
        taken.add(min(left, key=lambda block: kl_without(plan, taken | {block})))
    assert found == taken and len(found) >= 2
    # The best pair of all holds no promise for greedy, but no pair beats it by much.
    pairs = {
        pair: kl_without(plan, set(pair)) for pair in combinations(range(BLOCKS), 2)
    }
    assert kl_without(plan, taken) <= np.median(list(pairs.values()))


def test_no_block_goes_that_the_budget_can_keep(plan: Plan) -> None:
    for name in NAMES:
        policy = proposed(plan, name)
        assert plan.problem.within(policy)
        for block in gone(policy):
            back = Policy({**policy, f"blocks.{block}.block": DENSE})
            assert not plan.problem.within(back)


def test_influences_are_those_of_what_enters_and_leaves(plan: Plan) -> None:
    plan.bench.stitched.restore()
    model: Any = plan.bench.stitched.model
    seen: list[float] = []

    def watch(block: Any, args: Any, output: Any) -> None:
        x = args[0].double()
        y = (output[0] if isinstance(output, tuple) else output).double()
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        seen.append(1 - float(cosine.mean()))

    hooks = [block.register_forward_hook(watch) for block in model.model.layers]
    with torch.no_grad():
        model(plan.bench.splits["statistics"].ids)
    for hook in hooks:
        hook.remove()
    found = block_influences(plan.bench)
    np.testing.assert_allclose(found, seen, atol=1e-5)
    order = np.argsort(seen)
    lost = gone(proposed(plan, "block_similarity"))
    assert lost == set(order[: len(lost)].tolist()) and lost


@pytest.mark.parametrize("idle", [0, 3])
def test_a_block_that_does_nothing_goes_first(make: Any, idle: int) -> None:
    model = five_blocks()
    for weight in outputs(model, idle):
        weight.zero_()
    plan = make(model, objective={"budgets": {"size_bytes": "95%"}})
    influences = block_influences(plan.bench)
    assert influences[idle] == pytest.approx(0, abs=1e-6)
    assert min(i for at, i in enumerate(influences) if at != idle) > 1e-3
    removal = Removal.of(plan.problem, "sleb")
    rows = list(removal.dropped)
    grown = growths(removal, plan.bench, plan.bench.bank(), gone=[], tried=rows)
    assert grown[idle] == pytest.approx(0, abs=1e-6)
    for name in NAMES:
        assert gone(proposed(plan, name)) == {idle}


def test_a_small_change_that_matters_misleads_similarity_alone(make: Any) -> None:
    """One block writes a little to a feature that the head reads much larger."""
    model = five_blocks()
    for block in range(BLOCKS):
        for weight in outputs(model, block):
            weight[slice(1, None) if block == 2 else 0] = 0
            weight[0] *= 0.3
    model.model.norm.weight.data[0] = 30
    plan = make(model, objective={"budgets": {"size_bytes": "90%"}})
    assert gone(proposed(plan, "block_similarity")) == {2}
    kept = proposed(plan, "sleb")
    assert len(gone(kept)) == 1 and 2 not in gone(kept)
    assert kl_without(plan, gone(kept)) < 0.5 * kl_without(plan, {2})


def test_attentions_and_mlps_may_go_as_well(make: Any) -> None:
    plan = make(space=PARTS, search={"trials": 4, "proposals": ["sleb"]})
    policy = proposed(plan, "sleb")
    assert plan.problem.within(policy)
    kinds = {site.split(".")[2] for site, action in policy.items() if action == DROP}
    assert kinds and kinds <= {"attention", "mlp"}
    removal = Removal.of(plan.problem, "sleb")
    rows = list(removal.dropped)
    grown = growths(removal, plan.bench, plan.bench.bank(), gone=[], tried=rows)
    saved = np.array([removal.savings[row] for row in rows])
    first = plan.problem.space.sites[rows[int((grown / saved).argmin())]]
    assert policy[first.name] == DROP
    assert len(set(removal.savings.values())) == 2


def test_blocks_start_from_what_costs_most(make: Any) -> None:
    space = [{"sites": "*.block", "actions": ["drop", "rtn(bits=[4, 8], group=16)"]}]
    plan = make(space=space, objective={"budgets": {"size_bytes": "40%"}})
    for name in NAMES:
        policy = proposed(plan, name)
        texts = {str(a) for s, a in policy.items() if s.endswith("block")}
        assert texts == {"drop", "rtn(bits=8, group=16)"}


def test_a_loose_budget_keeps_every_block(make: Any) -> None:
    plan = make(objective={"budgets": {"size_bytes": "101%"}})
    assert gone(proposed(plan, "sleb")) == set()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"objective": {}},
            ConfigError,
            "sleb removes blocks until a budget is met, found no budget",
        ),
        (
            {"space": [{"actions": ["rtn(bits=[4, 8], group=16)"]}]},
            ConfigError,
            r"sleb: no site may be dropped. Give a rule such as \{sites: blocks",
        ),
        (
            {
                "space": PARTS,
                "search": {"trials": 4, "proposals": ["block_similarity"]},
            },
            ConfigError,
            "block_similarity: no whole block may be dropped",
        ),
        (
            {
                "space": [
                    {"sites": "*.mlp", "actions": ["drop", "dense"]},
                    {"sites": "*.o", "actions": ["rtn(bits=4, group=16)", "dense"]},
                ],
                "objective": {"budgets": {"size_bytes": "56%"}},
            },
            BudgetError,
            "sleb: without all 5 sites that may be dropped, size_bytes counts",
        ),
    ],
    ids=["no-budget", "no-drop", "no-block", "too-tight"],
)
def test_spaces_that_do_not_fit_are_told(
    make: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**changes)
