"""Structures: what belongs to one unit, in every layer of every family."""

from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import CONFIGS, tiny
from torch import Tensor, nn

from autoprune.errors import PolicyError
from autoprune.models.layers import Inventory, inventory
from autoprune.models.weights import read_weight, write_weight
from autoprune.policy import Action, Layer, Policy, Site

NO_HEADS = {"gpt2", "olmo2", "olmoe"}
"""One matrix for q, k and v; norms over all heads together."""

NO_MLP = {"mixtral", "qwen3_moe", "olmoe", "gpt_oss"}


def found_of(kind: str, **changes: Any) -> tuple[Any, Inventory]:
    model = tiny(kind, **changes)
    return model, inventory(model, register_architectures())


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found: Tensor = model(ids).logits
        return found


def remove(model: nn.Module, layer: Layer, unit: int) -> None:
    """Zero a layer's part of a unit."""
    cut = layer.cut
    assert cut is not None
    weight = read_weight(model, layer).clone()
    lines = slice(unit * cut.unit, (unit + 1) * cut.unit)
    if cut.axis == "rows":
        weight[lines] = 0
    else:
        weight[:, lines] = 0
    write_weight(model, layer, weight)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_makes_a_unit_is_of_no_use_once_it_is_not_taken(kind: str) -> None:
    model, found = found_of(kind)
    kinds = {group.name.rpartition(".")[2] for group in found.groups}
    expected = {"block", "hidden"} | ({"attention"} if kind not in NO_HEADS else set())
    assert kinds == expected | ({"mlp"} if kind not in NO_MLP else set())
    for group in found.groups:
        if group.kind in ("block", "hidden"):
            continue
        *makers, taker = group.layers
        assert taker.cut is not None and taker.cut.axis == "columns"
        assert taker.cut.unit * taker.cut.units == taker.shape[1]
        unit = taker.cut.units - 1
        remove(model, taker, unit)
        without = logits(model)
        for maker in makers:
            before = read_weight(model, maker).clone()
            remove(model, maker, unit)
            assert torch.equal(logits(model), without)
            write_weight(model, maker, before)
        for other in makers:  # another unit is of use
            remove(model, other, 0)
            assert not torch.equal(logits(model), without)


def test_heads_go_in_groups_that_share_keys_and_values() -> None:
    _, found = found_of("llama")
    group = next(g for g in found.groups if g.name == "blocks.0.attention")
    units = {layer.role: layer.cut.unit for layer in group.layers if layer.cut}
    assert units == {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16}
    assert {layer.cut.units for layer in group.layers if layer.cut} == {2}
    assert all(found.group_of(layer) == group for layer in group.layers)


def test_groups_take_the_place_of_their_parts_in_order() -> None:
    _, found = found_of("llama")
    names = [site.name for site in found.sites_for({"blocks.1.mlp", "nothing"})]
    assert names == [
        "embedding",
        *(f"blocks.0.{name}" for name in ("qkv", "o", "gate_up", "down")),
        *(f"blocks.1.{name}" for name in ("qkv", "o", "mlp")),
    ]
    assert found.sites_for(()) == found.sites
    alone = found.unfused().sites_for({"blocks.0.block", "blocks.1.attention"})
    names = [site.name for site in alone]
    assert names[:3] == ["embedding", "blocks.0.block", "blocks.1.attention"]
    assert names[3:] == [
        "blocks.1.gate_up.gate_proj",
        "blocks.1.gate_up.up_proj",
        "blocks.1.down",
    ]


def test_groups_that_overlap_are_refused() -> None:
    _, found = found_of("llama")
    with pytest.raises(PolicyError, match=r"'blocks.0.mlp' and 'blocks.0.block' both"):
        found.sites_for({"blocks.0.mlp", "blocks.0.block"})


def test_only_a_glob_with_its_last_name_asks_for_a_group() -> None:
    _, found = found_of("llama")
    assert found.groups_named({"*", "blocks.*", "blocks.0.*"}) == set()
    assert found.groups_named({"blocks.*.mlp"}) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert found.groups_named({"*.1.block"}) == {"blocks.1.block"}


def test_a_policy_may_name_groups() -> None:
    _, found = found_of("llama")
    sites = found.sites_for({"blocks.0.mlp"})
    some = Action.parse("channels(keep=0.5)")
    actions = {
        site.name: some if site.kind == "channels" else Action() for site in sites
    }
    per_layer = Policy(actions).per_layer(found.sites_for(actions))
    assert sum(action == some for action in per_layer.values()) == 3


def test_a_shape_that_does_not_fit_is_told() -> None:
    model = tiny("llama")
    model.config.num_key_value_heads = 3
    found = inventory(model, register_architectures())
    assert {group.kind for group in found.groups} == {"channels", "block", "hidden"}
    (note,) = found.notes
    assert note == (
        "no site 'attention': 32 rows of model.layers.0.self_attn.q_proj are no "
        "multiple of 3 units"
    )


def test_a_block_holds_all_its_layers() -> None:
    _, found = found_of("gpt2")
    groups = [group for group in found.groups if group.kind == "block"]
    inside: list[Site] = [s for s in found.sites if s.name.startswith("blocks.1.")]
    assert groups[1].layers == tuple(la for site in inside for la in site.layers)
