"""The inventory: which layers and sites a model has, and what is left beside them."""

import json
import logging
import math
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import CONFIGS, tiny
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from autoprune.errors import ModelError, PolicyError
from autoprune.models.layers import (
    Inventory,
    SiteRule,
    inventory,
    read_weight,
    untouched_parameters,
)
from autoprune.models.weights import expert_of, parameter_of

LLAMA = next(entry for entry in register_architectures() if entry.name == "llama")


def listed(model: nn.Module) -> Inventory:
    return inventory(model, register_architectures())


def header(folder: Path) -> dict[str, Any]:
    """Read the table of tensors of a saved model."""
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table: dict[str, Any] = json.loads(raw[8 : 8 + length])
    del table["__metadata__"]
    return table


def parameters(found: Inventory) -> Counter[str]:
    """Count the weights that layers cover, by the parameter that holds them."""
    numels: Counter[str] = Counter()
    for layer in found.layers:
        numels[parameter_of(layer.name)] += layer.numel
    return numels


class TestKnownArchitectures:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_names_are_unique_and_without_slash(self, kind: str) -> None:
        found = listed(tiny(kind))
        names = [site.name for site in found.sites]
        assert len(set(names)) == len(names)
        assert not any("/" in name for name in names)
        assert len({layer.name for layer in found.layers}) == len(found.layers)
        assert found.notes == ()

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_layers_describe_their_weights(self, kind: str) -> None:
        model = tiny(kind).to(torch.bfloat16)
        for layer in listed(model).layers:
            assert tuple(read_weight(model, layer).shape) == layer.shape
            assert layer.dtype == "bfloat16"

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_layers_and_the_rest_are_what_is_saved(
        self, kind: str, tmp_path: Path
    ) -> None:
        model = tiny(kind)
        found = listed(model)
        untouched, covered = (
            untouched_parameters(model, found),
            parameters(found),
        )
        model.save_pretrained(tmp_path, save_original_format=False)
        saved = header(tmp_path)
        assert untouched.keys() | covered.keys() == saved.keys()
        assert not untouched.keys() & covered.keys()
        for name, entry in saved.items():
            if name in untouched:
                assert untouched[name] == ("float32", tuple(entry["shape"]))
            else:
                assert covered[name] == math.prod(entry["shape"])

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_older_names_hold_as_many_bytes(self, kind: str, tmp_path: Path) -> None:
        model = tiny(kind)
        found = listed(model)
        model.save_pretrained(tmp_path)
        saved = sum(math.prod(entry["shape"]) for entry in header(tmp_path).values())
        rest = untouched_parameters(model, found).values()
        ours = sum(layer.numel for layer in found.layers)
        assert ours + sum(math.prod(shape) for _, shape in rest) == saved

    @pytest.mark.parametrize(
        ("kind", "tied"),
        [("llama", False), ("qwen2", True), ("gemma3", True), ("bert", True)],
    )
    def test_a_tied_embedding_is_one_layer(self, kind: str, tied: bool) -> None:
        model = tiny(kind)
        found = listed(model)
        assert found.tied is tied
        site = found.sites[0]
        assert (site.name, site.kind) == ("embedding", "embedding")
        assert (site.layers[0].block, site.layers[0].input) == (None, None)
        assert [s.kind for s in found.sites[1:]] == ["weights"] * (len(found.sites) - 1)
        head = [n for n in untouched_parameters(model, found) if n == "lm_head.weight"]
        assert len(head) == (not tied)

    def test_q_k_v_share_an_input_and_so_do_gate_and_up(self) -> None:
        found = listed(tiny("llama"))
        inputs = {layer.role: layer.input for layer in found.layers if layer.block == 1}
        assert inputs["q_proj"] == inputs["k_proj"] == inputs["v_proj"]
        assert inputs["gate_proj"] == inputs["up_proj"]
        assert len(set(inputs.values())) == 4
        first = {layer.input for layer in found.layers if layer.block == 0}
        assert not first & set(inputs.values())

    def test_experts_have_their_own_inputs(self) -> None:
        found = listed(tiny("mixtral"))
        experts = [layer for layer in found.layers if expert_of(layer.name)]
        assert len(experts) == 2 * 2 * 4
        assert len({layer.input for layer in experts}) == len(experts)
        assert {layer.uses for layer in experts} == {0.5}
        others = {layer.uses for layer in found.layers if layer not in experts}
        assert others == {1.0}
        site = next(s for s in found.sites if s.name == "blocks.1.experts.gate_up")
        assert [layer.name for layer in site.layers] == [
            f"model.layers.1.mlp.experts.gate_up_proj[{index}]" for index in range(4)
        ]
        assert {layer.shape for layer in site.layers} == {(96, 32)}

    @pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
    def test_the_router_stays_untouched(self, kind: str) -> None:
        model = tiny(kind)
        found = listed(model)
        names = [parameter_of(layer.name) for layer in found.layers]
        assert not any("router" in name or ".gate." in name for name in names)
        rest = untouched_parameters(model, found)
        assert sum("mlp.router.w" in n or "mlp.gate.w" in n for n in rest) == 2

    def test_roles_tell_layers_of_a_block_apart(self) -> None:
        for kind in ("gpt2", "bert"):
            layers = [la for la in listed(tiny(kind)).layers if la.block == 0]
            assert len({layer.role for layer in layers}) == len(layers)
        assert [la.role for la in listed(tiny("gpt2")).layers[1:5]] == [
            "c_attn",
            "attn.c_proj",
            "c_fc",
            "mlp.c_proj",
        ]

    def test_a_layer_is_found_by_name(self, tiny_model: LlamaForCausalLM) -> None:
        found = listed(tiny_model)
        assert found.layer("model.layers.0.mlp.up_proj").shape == (128, 64)
        with pytest.raises(PolicyError, match="unknown layer 'model.layers.0.mlp.up'"):
            found.layer("model.layers.0.mlp.up")


class TestDescriptions:
    def described(self, model: nn.Module, **changes: Any) -> Inventory:
        return inventory(model, [replace(LLAMA, **changes)])

    def test_a_missing_layer_is_named(self, tiny_model: LlamaForCausalLM) -> None:
        del tiny_model.model.layers[1].self_attn.k_proj
        with pytest.raises(
            ModelError,
            match=r"'llama' describes 'model.layers.1.self_attn.k_proj' .* lacks",
        ):
            listed(tiny_model)

    def test_missing_blocks_are_named(self, tiny_model: LlamaForCausalLM) -> None:
        with pytest.raises(ModelError, match=r"'llama' describes 'model.h' .* lacks"):
            self.described(tiny_model, blocks="model.h")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"blocks": "model.norm"}, "'model.norm' as ModuleList, .* LlamaRMSNorm"),
            ({"embedding": "model.norm"}, "'model.norm' as Embedding, .* LlamaRMSNorm"),
            ({"sites": (SiteRule("x", ("mlp",)),)}, "'model.layers.0.mlp' .* LlamaMLP"),
        ],
        ids=["blocks", "embedding", "layer"],
    )
    def test_another_kind_is_named(
        self, changes: dict[str, Any], message: str, tiny_model: LlamaForCausalLM
    ) -> None:
        with pytest.raises(ModelError, match=message):
            self.described(tiny_model, **changes)

    def test_layers_of_one_input_must_be_as_wide(
        self, tiny_model: LlamaForCausalLM
    ) -> None:
        paths = ("mlp.up_proj", "mlp.down_proj")
        with pytest.raises(ModelError, match=r"'mlp' share .* reads 64 and .* 128"):
            self.described(tiny_model, sites=(SiteRule("mlp", paths),))
        rule = SiteRule("mlp", paths, one_input=False)
        found = self.described(tiny_model, sites=(rule,), embedding=None)
        assert [site.name for site in found.sites] == ["blocks.0.mlp", "blocks.1.mlp"]
        assert [la.input for la in found.layers] == [la.name for la in found.layers]

    def test_without_an_embedding_it_stays_untouched(
        self, tiny_model: LlamaForCausalLM
    ) -> None:
        found = self.described(tiny_model, embedding=None)
        rest = untouched_parameters(tiny_model, found)
        assert rest["model.embed_tokens.weight"] == ("float32", (256, 64))
        assert "lm_head.weight" not in rest
        assert found.tied

    def test_names_are_those_that_are_saved(
        self, tiny_model: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        # A head that stands before the embedding it is tied to, and a tensor that the
        # model says not to save.
        tiny_model._modules["model"] = tiny_model._modules.pop("model")
        tiny_model._keys_to_ignore_on_save = {"model.norm.weight"}
        assert next(iter(tiny_model.state_dict())) == "lm_head.weight"
        found = self.described(tiny_model, sites=(), embedding=None)
        tiny_model.save_pretrained(tmp_path)
        saved = header(tmp_path).keys()
        assert untouched_parameters(tiny_model, found).keys() == saved
        assert "model.norm.weight" not in saved

    def test_experts_must_be_3d(self, tiny_model: LlamaForCausalLM) -> None:
        rule = SiteRule("norm", ("input_layernorm.weight",))
        with pytest.raises(ModelError, match=r"3-D .* shape \(64,\) and None"):
            self.described(tiny_model, sites=(rule,))

    def test_two_descriptions_of_one_type_clash(
        self, tiny_model: LlamaForCausalLM
    ) -> None:
        mine = replace(LLAMA, name="mine")
        with pytest.raises(ModelError, match=r"'llama': 'llama' and 'mine'"):
            inventory(tiny_model, [LLAMA, mine])


class Block(nn.Module):
    """A block as no library has it."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"wq": nn.Linear(4, 4), "w/o": nn.Linear(4, 4)})
        self.experts = nn.ModuleList(nn.Linear(4, 6) for _ in range(experts))


class Unknown(nn.Module):
    """Two blocks of three experts each, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.adapters = nn.ModuleList([nn.Linear(4, 4)])
        self.trunk = nn.ModuleDict({"layers": nn.ModuleList([Block(3), Block(3)])})
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(5))
        self.head = nn.Linear(4, 8)


class TestUnknownArchitectures:
    def test_one_site_a_layer(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            found = listed(Unknown())
        assert found.architecture == "unknown"
        assert found.blocks == ("trunk.layers.0", "trunk.layers.1")
        assert [site.name for site in found.sites[:5]] == [
            "blocks.0.attention.wq",
            "blocks.0.attention.w_o",
            "blocks.0.experts.0",
            "blocks.0.experts.1",
            "blocks.0.experts.2",
        ]
        assert len(found.sites) == 10
        assert all(len(site.layers) == 1 for site in found.sites)
        assert found.layers[5].name == "trunk.layers.1.attention.wq"
        assert (found.layers[5].block, found.layers[5].role) == (1, "wq")
        assert [la.input for la in found.layers] == [la.name for la in found.layers]
        assert (
            "one site a layer, 10 in the 2 blocks of 'trunk.layers'" in found.notes[0]
        )
        assert caplog.messages == list(found.notes)

    def test_everything_outside_of_blocks_stays_untouched(self) -> None:
        model = Unknown()
        rest = untouched_parameters(model, listed(model))
        outside = {n for n in model.state_dict() if not n.startswith("trunk.")}
        biases = {n for n in model.state_dict() if n.endswith("bias")}
        assert rest.keys() == outside | biases

    def test_a_known_model_without_description(self) -> None:
        model: PreTrainedModel = tiny("gpt2")
        found = inventory(model, [])
        described = listed(model)
        assert {(la.name, la.shape) for la in found.layers} == {
            (la.name, la.shape) for la in described.layers
        }
        assert "unknown architecture 'gpt2'" in found.notes[0]

    def test_a_shared_weight_is_listed_once(self) -> None:
        model = Unknown()
        layers = model.trunk["layers"]
        layers[1].attention["wq"].weight = layers[0].attention["wq"].weight
        assert len(listed(model).layers) == 9

    def test_a_list_of_bare_layers(self) -> None:
        model = nn.ModuleDict({"stack": nn.ModuleList([nn.Linear(4, 4)] * 1)})
        found = listed(model)
        assert [(s.name, s.layers[0].name) for s in found.sites] == [
            ("blocks.0", "stack.0")
        ]

    def test_nothing_to_find(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        with pytest.raises(ModelError, match=r"blocks of .* None \(Sequential\)"):
            listed(model)
