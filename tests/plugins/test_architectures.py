"""The described families: which sites each has."""

import pytest
from autoprune_plugins.architectures import register_architectures
from tiny_models import CONFIGS, tiny

from autoprune.models.layers import inventory

GATED = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}
EXPERTS = {
    "qkv": GATED["qkv"],
    "o": GATED["o"],
    "experts.gate_up": [f"mlp.experts.gate_up_proj[{i}]" for i in range(4)],
    "experts.down": [f"mlp.experts.down_proj[{i}]" for i in range(4)],
}
OTHERS = {
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "gpt_oss": EXPERTS,
    "gpt2": {
        "qkv": ["attn.c_attn"],
        "o": ["attn.c_proj"],
        "up": ["mlp.c_fc"],
        "down": ["mlp.c_proj"],
    },
    "opt": {
        "qkv": GATED["qkv"],
        "o": ["self_attn.out_proj"],
        "up": ["fc1"],
        "down": ["fc2"],
    },
    "bert": {
        "qkv": [f"attention.self.{name}" for name in ("query", "key", "value")],
        "o": ["attention.output.dense"],
        "up": ["intermediate.dense"],
        "down": ["output.dense"],
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_sites(kind: str) -> None:
    found = inventory(tiny(kind), register_architectures())
    expected = OTHERS.get(kind, GATED)
    assert [site.name for site in found.sites] == [
        "embedding",
        *(f"blocks.{index}.{name}" for index in (0, 1) for name in expected),
    ]
    for index, site in enumerate(found.sites[1:]):
        block, name = divmod(index, len(expected))
        paths = expected[list(expected)[name]]
        assert [layer.name for layer in site.layers] == [
            f"{found.blocks[block]}.{path}" for path in paths
        ]
        assert {layer.block for layer in site.layers} == {block}


def test_every_described_type_is_tried() -> None:
    described = [t for a in register_architectures() for t in a.model_types]
    assert sorted(described) == sorted(CONFIGS)


def test_names_are_unique() -> None:
    names = [architecture.name for architecture in register_architectures()]
    assert len(set(names)) == len(names)
