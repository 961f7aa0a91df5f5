"""A smaller model of the same class: its configuration, and which blocks can go."""

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import tiny
from tiny_own import own_model

from autoprune.exporting.shrinking import (
    Remains,
    passing_blocks,
    shrunk_config,
    shrunk_state,
    skeleton,
)
from autoprune.models.layers import inventory


@pytest.mark.parametrize(
    ("kind", "passing"),
    [
        ("llama", {0, 1}),
        ("gemma3", {0, 1}),
        ("olmo2", {0, 1}),  # norms behind the layers make nothing of nothing
        ("gpt_oss", set()),  # its experts have biases
        ("gpt2", set()),
        ("bert", set()),  # norms what passes by
    ],
)
def test_blocks_that_add_nothing_are_seen(kind: str, passing: set[int]) -> None:
    model = tiny(kind)
    assert passing_blocks(model, inventory(model, register_architectures())) == passing


def test_a_bias_holds_its_own_block_alone() -> None:
    model = tiny("llama", mlp_bias=True, num_hidden_layers=3)
    for index in (0, 2):
        torch.nn.init.zeros_(model.model.layers[index].mlp.down_proj.bias)
    found = inventory(model, register_architectures())
    assert passing_blocks(model, found) == {0, 2}


def test_a_model_that_cannot_be_traced_has_no_blocks_that_can_go() -> None:
    model = tiny("llama")
    del model.model.layers[1].mlp.up_proj
    found = inventory(model, [])
    assert found.architecture == "unknown"
    assert passing_blocks(model, found) == frozenset()


def test_a_configuration_without_a_width_is_refused() -> None:
    model = own_model()
    found = inventory(model, [])
    with pytest.raises(ValueError, match="OwnConfig has no setting for the channels"):
        shrunk_config(model.config, Remains((0, 1), (("channels", 24),)), found)


def test_the_configuration_of_the_text_model_is_cut() -> None:
    model = tiny("gemma3")
    found = inventory(model, register_architectures())
    remains = Remains((1,), (("channels", 24), ("heads", 1)))
    small = shrunk_config(model.config, remains, found)
    text = small.get_text_config()
    assert text.layer_types == ["full_attention"]
    assert (text.num_hidden_layers, text.intermediate_size) == (1, 24)
    assert (text.num_attention_heads, text.num_key_value_heads) == (2, 1)
    assert small.vision_config.num_hidden_layers == 1
    assert model.config.get_text_config().num_hidden_layers == 2


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "depend on their number"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers .* by number"),
    ],
)
def test_numbers_of_blocks_in_a_configuration_are_refused(
    kind: str, changes: dict[str, object], told: str
) -> None:
    model = tiny("llama")
    config = tiny(kind, **changes).config
    found = inventory(model, register_architectures())
    with pytest.raises(ValueError, match=told):
        shrunk_config(config, Remains((1,)), found)


def test_tensors_are_cut_and_counted_anew() -> None:
    model = tiny("gpt2")
    found = inventory(model, register_architectures())
    up, down = (la for la in found.layers if la.block == 1 and ".mlp." in la.name)
    kept = torch.tensor([1, 5, 7])
    state = model.state_dict()
    small = shrunk_state(
        model,
        state,
        Remains((1,), (("channels", 3),)),
        inventory=found,
        kept={up: kept, down: kept},
    )
    was, now = "transformer.h.1.mlp", "transformer.h.0.mlp"
    weight, bias = "c_fc.weight", "c_fc.bias"
    assert torch.equal(small[f"{now}.{weight}"], state[f"{was}.{weight}"][:, kept])
    assert torch.equal(small[f"{now}.{bias}"], state[f"{was}.{bias}"][kept])
    back = "c_proj.weight"
    assert torch.equal(small[f"{now}.{back}"], state[f"{was}.{back}"][kept])
    assert torch.equal(small[f"{now}.c_proj.bias"], state[f"{was}.c_proj.bias"])
    assert not any("h.1." in name for name in small)
    config = shrunk_config(
        model.config, Remains((1,), (("channels", 3),)), inventory=found
    )
    shapes = {n: t.shape for n, t in skeleton(model, config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in small.items()} == shapes
