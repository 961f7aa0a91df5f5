"""A weight is read and written as [out, in], however it is stored."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny
from torch.nn import functional
from transformers import LlamaForCausalLM

from autoprune.errors import ModelError, PolicyError
from autoprune.models.weights import expert_of, read_weight, write_weight
from autoprune.policy import Layer

LLAMA_K = Layer("model.layers.1.self_attn.k_proj", (32, 64), "float32", 1, "k_proj", "")


def layer(name: str, *shape: int) -> Layer:
    return Layer(name, (shape[0], shape[1]), "float32", 0, "x", name)


def test_a_linear_layer_is_a_view(tiny_model: LlamaForCausalLM) -> None:
    weight = read_weight(tiny_model, LLAMA_K)
    stored = tiny_model.model.layers[1].self_attn.k_proj.weight
    assert weight.data_ptr() == stored.data_ptr()
    assert not weight.requires_grad


def test_conv1d_is_seen_transposed(rng: torch.Generator) -> None:
    model = tiny("gpt2")
    module = model.transformer.h[0].attn.c_attn
    weight = read_weight(model, layer("transformer.h.0.attn.c_attn", 96, 32))
    inputs = torch.randn(5, 32, generator=rng)
    torch.testing.assert_close(
        module(inputs), functional.linear(inputs, weight, module.bias)
    )
    assert weight.data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_an_expert_is_a_slice(kind: str) -> None:
    model = tiny(kind)
    stored = model.model.layers[1].mlp.experts.gate_up_proj[2]
    name = "model.layers.1.mlp.experts.gate_up_proj[2]"
    weight = read_weight(model, layer(name, 96, 32))
    assert torch.equal(weight, stored.t() if kind == "gpt_oss" else stored)
    assert weight.data_ptr() == stored.data_ptr()


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("llama", "model.layers.1.self_attn.k_proj", (16, 32)),
        ("gpt2", "transformer.h.1.mlp.c_fc", (128, 32)),
        ("mixtral", "model.layers.0.mlp.experts.down_proj[3]", (32, 48)),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj[3]", (32, 48)),
        ("gpt2", "transformer.wte", (64, 32)),
    ],
    ids=["linear", "conv1d", "expert", "transposed-expert", "embedding"],
)
def test_what_is_written_is_read_and_nothing_else_changes(
    kind: str, name: str, shape: tuple[int, int], rng: torch.Generator
) -> None:
    model, target = tiny(kind), layer(name, *shape)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    old = read_weight(model, target).clone()
    new = torch.randn(shape, generator=rng)
    write_weight(model, target, new)
    assert torch.equal(read_weight(model, target), new)
    changed = {
        k for k, v in model.state_dict().items() if not torch.equal(v, before[k])
    }
    tied = {"transformer.wte.weight", "lm_head.weight"}
    assert len(changed) == 1 or changed == tied
    write_weight(model, target, old)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_writing_a_tied_embedding_changes_the_head() -> None:
    model = tiny("gpt2")
    write_weight(model, layer("transformer.wte", 64, 32), torch.zeros(64, 32))
    assert not model.lm_head.weight.any()


def test_writing_rounds_to_the_stored_type(tiny_model: LlamaForCausalLM) -> None:
    model = tiny_model.to(torch.bfloat16)
    write_weight(model, LLAMA_K, torch.full((32, 64), 1.001))
    assert torch.equal(
        read_weight(model, LLAMA_K), torch.ones(32, 64, dtype=torch.bfloat16)
    )


def test_a_wrong_shape_is_refused(tiny_model: LlamaForCausalLM) -> None:
    before = read_weight(tiny_model, LLAMA_K).clone()
    with pytest.raises(PolicyError, match=r"k_proj' has shape \(64, 32\), expected"):
        write_weight(tiny_model, LLAMA_K, torch.zeros(64, 32))
    assert torch.equal(read_weight(tiny_model, LLAMA_K), before)


def test_a_layer_of_another_shape_is_refused(tiny_model: LlamaForCausalLM) -> None:
    other = replace(LLAMA_K, shape=(16, 64))
    with pytest.raises(ModelError, match=r"shape \(32, 64\) in the model, expected"):
        read_weight(tiny_model, other)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.7.self_attn.k_proj",
        "model.layers.0.mlp.experts.down_proj[0]",
        "model.norm.weight[0]",
        "model.layers.0.mlp.act_fn",
    ],
)
def test_a_layer_that_the_model_lacks_is_refused(
    name: str, tiny_model: LlamaForCausalLM
) -> None:
    with pytest.raises(ModelError) as caught:
        read_weight(tiny_model, replace(LLAMA_K, name=name))
    assert f"has no layer {name!r}" in str(caught.value)


def test_an_expert_that_the_model_lacks_is_refused() -> None:
    name = "model.layers.0.mlp.experts.down_proj[4]"
    with pytest.raises(ModelError, match=r"no layer '.*down_proj\[4\]'"):
        read_weight(tiny("mixtral"), layer(name, 32, 48))


def test_only_names_with_an_index_are_experts() -> None:
    assert expert_of("a.experts.down_proj[12]") == ("a.experts", "down_proj", 12)
    assert expert_of("a.experts.down_proj") is None
