"""Settings that give layers biases are found by what they do."""

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import tiny

from autoprune.exporting.switches import BiasSwitches
from autoprune.models.layers import inventory

NO = "no place"
EXPECTED = {
    "llama": {"o_proj": "attention_bias", "down_proj": "mlp_bias"},
    "granite": {"o_proj": "attention_bias", "down_proj": "mlp_bias"},
    "smollm3": {"o_proj": "attention_bias", "down_proj": "mlp_bias"},
    "qwen3": {"o_proj": "attention_bias", "down_proj": NO},
    "gemma2": {"o_proj": "attention_bias", "down_proj": NO},
    "olmo2": {"o_proj": "attention_bias", "down_proj": NO},
    "qwen2": {"q_proj": None, "o_proj": NO, "down_proj": NO},
    "mistral": {"o_proj": NO, "down_proj": NO},
    "mixtral": {"o_proj": NO},
    "gpt2": {"attn.c_proj": None, "mlp.c_proj": None},
    "opt": {"out_proj": None, "fc2": None},
}
"""Setting by role; None where there is a bias already."""


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_family_has_its_own(kind: str) -> None:
    model = tiny(kind)
    found = inventory(model, register_architectures())
    switches = BiasSwitches(model, found)
    for role, wanted in EXPECTED[kind].items():
        layer = next(la for la in found.layers if la.role == role)
        why = switches.refuses(layer)
        assert bool(why) == (wanted == NO), role
        needed = switches.needed([layer])
        assert needed == ((wanted,) if wanted not in (None, NO) else ())
        for name, zeros in switches.added(needed).items():
            assert name.endswith(".bias") and not zeros.any()
            assert zeros.shape == model.get_submodule(name[:-5]).weight.shape[:1]


def test_both_settings_at_once() -> None:
    model = tiny("llama").to(torch.bfloat16)
    found = inventory(model, register_architectures())
    switches = BiasSwitches(model, found)
    needed = switches.needed(found.layers)
    assert needed == ("attention_bias", "mlp_bias")
    added = switches.added(needed)
    assert {zeros.dtype for zeros in added.values()} == {torch.bfloat16}
    assert len(added) == 14  # seven layers in each of two blocks
