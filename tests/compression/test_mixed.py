"""A bank of two: every layer has the variant of its own bank, whoever comes before."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import config_of, write_text

from autoprune.compression.mixed import MixedBank
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer, Policy
from autoprune.searching.plan import Plan

ACTIONS = ["sparsegpt(sparsity=0.6)"]


@pytest.fixture
def plan(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Plan:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path),
        space=[{"sites": "blocks.*", "actions": ACTIONS}],
        bank="dense",
        objective={},
    )
    return Plan.make(config, load_plugins())


@pytest.fixture
def policy(plan: Plan) -> Policy:
    return plan.problem.space.at(np.zeros(len(plan.problem.space.sites), dtype=int))


@pytest.fixture
def actions(plan: Plan, policy: Policy) -> dict[Layer, Action]:
    """Of the layers that are compressed."""
    pairs = plan.bench.per_layer(policy).items()
    return {layer: action for layer, action in pairs if action.steps}


@pytest.fixture
def mixed(plan: Plan, policy: Policy) -> MixedBank:
    taken = frozenset(la for la in plan.bench.layers if la.name.endswith("o_proj"))
    assert taken
    return MixedBank.of(plan.bank, plan.bench.bank(policy), taken)


def weight_of(plan: Plan, layer: Layer) -> torch.Tensor:
    return plan.bench.stitched.model.get_parameter(f"{layer.name}.weight").clone()


def test_each_layer_has_the_variant_of_its_bank(
    mixed: MixedBank, plan: Plan, actions: dict[Layer, Action]
) -> None:
    # Nothing is made yet: the banks take each other's variants off while they make.
    assert len(mixed.missing(actions.items())) == len(actions)
    mixed.put(actions)
    found = {layer: weight_of(plan, layer) for layer in actions}
    differs = 0
    for layer, action in actions.items():
        bank = mixed.other if layer in mixed.taken else mixed.own
        assert torch.equal(found[layer], bank.weight(layer, action).to(found[layer]))
        both = [one.weight(layer, action) for one in (mixed.own, mixed.other)]
        differs += not torch.equal(*both)
    assert differs > len(mixed.taken) / 2  # else the test would tell nothing
    assert mixed.missing(actions.items()) == []


def test_banks_take_turns_on_one_model(
    mixed: MixedBank, plan: Plan, actions: dict[Layer, Action]
) -> None:
    mixed.put(actions)
    before = {layer: weight_of(plan, layer) for layer in actions}
    mixed.other.put(actions)
    mixed.own.put(actions)
    assert mixed.put(actions) == len(actions)
    assert all(torch.equal(weight_of(plan, la), before[la]) for la in actions)
    assert mixed.put(actions) == 0


def test_a_variant_is_made_once_for_a_bank_and_its_mixes(
    mixed: MixedBank, actions: dict[Layer, Action]
) -> None:
    mixed.own.make(actions.items())
    assert mixed.make(actions.items()) == len(mixed.taken)
    assert mixed.make(actions.items()) == 0


def test_mixes_of_other_layers_have_other_names(mixed: MixedBank) -> None:
    names = {mixed.name, mixed.own.name, mixed.other.name}
    fewer = frozenset(sorted(mixed.taken, key=lambda la: la.name)[:1])
    names.add(MixedBank.of(mixed.own, mixed.other, fewer).name)
    assert len(names) == 4
    again = MixedBank.of(mixed.own, mixed.other, mixed.taken)
    assert again.name == mixed.name
