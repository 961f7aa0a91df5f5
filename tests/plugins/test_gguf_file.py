"""The target ``gguf``: its file to the byte, weights to the bit, what it refuses."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoprune_plugins.gguf_file import GgufFile
from gguf import GGUFReader, dequantize
from tiny_exports import Case
from tiny_gguf import SIZES, gguf_case, piece_tokenizer
from tiny_models import CONFIGS, tiny
from tiny_runs import config_of, write_text
from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM

import autoprune
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.deliver import export_policy
from autoprune.errors import ExportError
from autoprune.exporting.digests import digests_of
from autoprune.exporting.exporter import EXACT
from autoprune.exporting.marker import MARKER
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer, Policy
from autoprune.searching.plan import Plan
from autoprune.targets.gguf_reading import MODEL_FILE

RTN = "rtn(bits=4, group=32, symmetric=true)"
EIGHT = "rtn(bits=8, symmetric=true)"
HALF = "channels(keep=0.67, score=magnitude)"  # 64 of 96
MORE = "channels(keep=0.34, score=magnitude)"  # 32 of 96
HEAD = "heads(keep=0.5, score=magnitude)"

MIXED = {
    "embedding": "rtn(bits=8, group=32, symmetric=true)",
    "blocks.0.qkv": RTN,
    "blocks.0.o": "rtn(bits=4, group=32)",
    "blocks.0.gate_up": "rtn(bits=3, group=64)",
    "blocks.0.down": "rtn(bits=6)",
    "blocks.1.qkv": "mxfp4()",
    "blocks.1.o": "magnitude(pattern=2:4) + rtn(bits=4, group=32)",
    "blocks.1.gate_up": "magnitude(pattern=2:4)",
    "blocks.2.down": EIGHT,
}
"""Every type but those with rounded minima."""


def everywhere(name: str, action: str) -> dict[str, str]:
    return {f"blocks.{block}.{name}": action for block in range(3)}


def exporter_of(case: Case) -> GgufFile:
    return GgufFile().for_model(case.dense, case.job.inventory)


def export_of(case: Case, folder: Path) -> tuple[Any, dict[str, str]]:
    """Write and load; check refusals, sizes and every layer."""
    folder.mkdir()
    exporter, job = exporter_of(case), case.job
    for layer, storage in job.storages.items():
        assert exporter.refuses(layer, storage) is None, layer.name
    assert exporter.refuses_policy(job.storages, job.inventory) is None
    digests = exporter.write(folder, job)
    size = exporter.size_bytes(job.storages, case.untouched)
    assert exporter.written_bytes(folder) == size
    prices = [exporter.layer_bytes(la, one) for la, one in job.storages.items()]
    base = exporter.size_bytes({}, case.untouched)
    assert (
        size
        <= base + sum(prices)
        == exporter.size_bytes(dict(list(job.storages.items())[1:]), case.untouched)
        + prices[0]
    )
    model = GgufFile().load(folder)
    assert digests_of(model, list(digests)) == digests
    names = {name for name in digests if "self_attn" in name or "mlp" in name}
    assert len(names) == 7 * model.config.num_hidden_layers
    return model, digests


def tensors(folder: Path) -> dict[str, Tensor]:
    """Read a file with gguf's own reader."""
    found = {}
    for tensor in GGUFReader(folder / MODEL_FILE).tensors:
        plain = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        shape = [int(size) for size in reversed(tensor.shape)]
        found[tensor.name] = torch.from_numpy(plain).view(*shape)
    return found


def fields(folder: Path) -> dict[str, Any]:
    reader = GGUFReader(folder / MODEL_FILE)
    return {name: field.contents() for name, field in reader.fields.items()}


def kinds(folder: Path) -> dict[str, str]:
    reader = GGUFReader(folder / MODEL_FILE)
    return {one.name: one.tensor_type.name for one in reader.tensors}


def in_pairs(weight: Tensor, head: int = 16) -> Tensor:
    """Put row i of a head before the row half a head further on: spelt row by row."""
    rows = []
    for start in range(0, len(weight), head):
        for i in range(head // 2):
            rows += [weight[start + i], weight[start + head // 2 + i]]
    return torch.stack(rows)


HF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def hf_name(name: str) -> str:
    """Translate a tensor's name, by a table of our own."""
    stem, _, last = name.rpartition(".")
    if not stem.startswith("blk."):
        outer = {"token_embd": "embed_tokens", "output_norm": "norm"}
        return f"model.{outer[stem]}.{last}" if stem in outer else f"lm_head.{last}"
    _, block, role = stem.split(".")
    return f"model.layers.{block}.{HF[role]}.{last}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_dense_models_to_the_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = gguf_case(kind, tmp_path / "dense", dtype=dtype)
    model, _ = export_of(case, tmp_path / "export")
    assert type(model) is type(case.dense) and model.dtype == dtype
    assert torch.equal(case.logits(model), case.logits())
    state = case.dense.state_dict()
    found = tensors(tmp_path / "export")
    wanted = set(state) - ({"lm_head.weight"} if kind == "qwen2" else set())
    assert {hf_name(name) for name in found} == wanted
    for name, tensor in found.items():
        plain = state[hf_name(name)].float()
        paired = kind in ("llama", "mistral") and re.search(r"attn_[qk]\.", name)
        assert torch.equal(tensor, in_pairs(plain) if paired else plain), name
        vector = "F32" if plain.dim() == 1 else kinds(tmp_path / "export")[name]
        kept = {"torch.bfloat16": "BF16", "torch.float16": "F16"}
        expected = "F32" if plain.dim() == 1 else kept.get(str(dtype), "F32")
        assert vector == expected
    assert exporter_of(case).bounds(case.job.storages) == EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_codes_are_read_back_by_gguf_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    policy = (
        MIXED
        if dtype == torch.bfloat16
        else {name: text for name, text in MIXED.items() if name != "blocks.0.o"}
    )
    case = gguf_case("llama", tmp_path / "dense", policy, dtype=dtype)
    model, _ = export_of(case, tmp_path / "export")
    assert torch.equal(case.logits(model), case.logits())
    found, state = tensors(tmp_path / "export"), case.model.state_dict()
    for name, tensor in found.items():
        plain = tensor.to(dtype)
        wanted = state[hf_name(name)]
        paired = re.search(r"attn_[qk]\.", name)
        assert torch.equal(plain, in_pairs(wanted) if paired else wanted), name
    stored = kinds(tmp_path / "export")
    assert stored["token_embd.weight"] == "Q8_0"
    assert stored["blk.0.attn_q.weight"] == "Q4_0"
    assert stored["blk.0.ffn_up.weight"] == "Q4_0"
    assert stored["blk.0.ffn_down.weight"] == "Q8_0"
    assert stored["blk.1.attn_v.weight"] == "MXFP4"
    assert stored["blk.1.attn_output.weight"] == "Q5_0"
    assert stored["blk.2.ffn_down.weight"] == "Q8_0"
    if dtype == torch.bfloat16:
        assert stored["blk.0.attn_output.weight"] == "Q4_1"
    assert exporter_of(case).bounds(case.job.storages) == EXACT


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_codes_of_other_families(kind: str, tmp_path: Path) -> None:
    case = gguf_case(kind, tmp_path / "dense", {"*": EIGHT})
    model, _ = export_of(case, tmp_path / "export")
    assert torch.equal(case.logits(model), case.logits())


@pytest.mark.parametrize(
    ("dtype", "action"),
    [
        (torch.float32, RTN),
        (torch.float32, EIGHT),
        (torch.float16, "rtn(bits=4, group=32)"),
        (torch.bfloat16, "rtn(bits=5, group=32)"),
        (torch.bfloat16, "hqq(bits=4, group=32)"),
    ],
)
def test_what_is_rounded_is_told_to_the_bit(
    dtype: torch.dtype, action: str, tmp_path: Path
) -> None:
    case = gguf_case("llama", tmp_path / "dense", {"*": action}, dtype=dtype)
    model, digests = export_of(case, tmp_path / "export")
    masked = digests_of(case.model, list(digests))
    assert masked != digests
    exporter = exporter_of(case)
    bounds = exporter.bounds(case.job.storages)
    assert "float16" in bounds.why and bounds.perplexity == 5e-3
    gap = (case.logits(model) - case.logits()).norm() / case.logits().norm()
    assert gap < 0.01 if dtype != torch.bfloat16 else gap < 0.05
    notes = exporter.notes(case.job.storages)
    assert any("21 layers are rounded" in n or "22 layers" in n for n in notes), notes


def test_the_head_tells_what_llama_cpp_needs(tmp_path: Path) -> None:
    case = gguf_case("llama", tmp_path / "dense", {"*": RTN})
    export_of(case, tmp_path / "export")
    head = fields(tmp_path / "export")
    assert head["general.architecture"] == "llama"
    assert head["llama.block_count"] == 3
    assert head["llama.embedding_length"] == 64
    assert head["llama.feed_forward_length"] == 96
    assert head["llama.attention.head_count"] == 4
    assert head["llama.attention.head_count_kv"] == 2
    assert head["llama.attention.key_length"] == 16
    assert head["llama.rope.dimension_count"] == 16
    assert head["llama.rope.freq_base"] == 10000.0
    assert head["llama.context_length"] == 64
    assert head["llama.vocab_size"] == 320
    assert head["general.file_type"] == 2  # mostly Q4_0
    assert head["tokenizer.ggml.pre"] == "smollm"


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    case = gguf_case("mistral", tmp_path / "dense", sliding_window=24)
    export_of(case, tmp_path / "export")
    assert fields(tmp_path / "export")["llama.context_length"] == 24
    [note] = exporter_of(case).notes(case.job.storages)
    assert note.startswith("the context is 24 tokens")


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_rotary_frequencies_scaled_one_by_one(tmp_path: Path) -> None:
    case = gguf_case("llama", tmp_path / "dense", rope_parameters=LLAMA3)
    model, _ = export_of(case, tmp_path / "export")
    assert torch.equal(case.logits(model), case.logits())
    assert model.config.rope_parameters["rope_type"] == "llama3"
    # Wavelengths 2 pi 10000^(i/8) against 32 / 4 and 32 / 1, as in Llama 3.1.
    wanted = []
    for i in range(8):
        wave = 2 * torch.pi * 10000 ** (i / 8)
        smooth = (32 / wave - 1) / 3
        between = 1 / ((1 - smooth) / 8 + smooth)
        wanted.append(1.0 if wave < 8 else 8.0 if wave > 32 else between)
    factors = tensors(tmp_path / "export")["rope_freqs.weight"]
    torch.testing.assert_close(factors, torch.tensor(wanted), rtol=1e-5, atol=0)
    assert 1 < factors[1] < 8


def test_frequencies_scaled_alike(tmp_path: Path) -> None:
    settings = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    case = gguf_case("qwen3", tmp_path / "dense", rope_parameters=settings)
    model, _ = export_of(case, tmp_path / "export")
    assert torch.equal(case.logits(model), case.logits())
    head = fields(tmp_path / "export")
    assert head["qwen3.rope.scaling.type"] == "linear"
    assert head["qwen3.rope.scaling.factor"] == 2.0
    assert head["qwen3.rope.freq_base"] == 500.0


def test_equal_widths_are_a_smaller_llama(tmp_path: Path) -> None:
    policy = {
        **everywhere("mlp", f"{HALF} + {EIGHT}"),
        **everywhere("attention", f"{HEAD} + {RTN}"),
    }
    case = gguf_case("llama", tmp_path / "dense", policy)
    model, _ = export_of(case, tmp_path / "export")
    assert isinstance(model, LlamaForCausalLM)
    assert model.model.layers[2].mlp.down_proj.weight.shape == (64, 64)
    assert model.model.layers[0].self_attn.o_proj.weight.shape == (64, 32)
    torch.testing.assert_close(case.logits(model), case.logits(), rtol=0.1, atol=0.05)
    head = fields(tmp_path / "export")
    assert head["general.architecture"] == "llama"
    assert head["llama.feed_forward_length"] == 64
    assert head["llama.attention.head_count"] == 2
    assert head["llama.attention.head_count_kv"] == 1
    exporter = exporter_of(case)
    assert "fewer zeros" in exporter.bounds(case.job.storages).why
    assert exporter.notes(case.job.storages)[:2] == [
        "cut groups of heads: 1 of 2 stay in a block",
        "cut channels: 64 of 96 stay in a block",
    ]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_channels_and_blocks_of_other_families(kind: str, tmp_path: Path) -> None:
    policy = {**everywhere("mlp", HALF), "blocks.1.block": "drop"}
    policy.pop("blocks.1.mlp")
    case = gguf_case(kind, tmp_path / "dense", policy)
    model, _ = export_of(case, tmp_path / "export")
    torch.testing.assert_close(case.logits(model), case.logits(), rtol=0.1, atol=0.05)
    head = fields(tmp_path / "export")
    arch = head["general.architecture"]
    assert (head[f"{arch}.block_count"], head[f"{arch}.feed_forward_length"]) == (2, 64)
    notes = exporter_of(case).notes(case.job.storages)
    assert "left out blocks 1 of 3, counted from 0" in notes


UNEVEN = {
    "blocks.0.mlp": f"{HALF} + {EIGHT}",
    "blocks.0.attention": f"{HEAD} + {RTN}",
    "blocks.1.attention": "drop",
    "blocks.2.mlp": MORE,
}


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_different_widths_are_deci_and_load_whole(kind: str, tmp_path: Path) -> None:
    case = gguf_case(kind, tmp_path / "dense", UNEVEN)
    model, _ = export_of(case, tmp_path / "export")
    assert type(model) is type(case.dense)
    assert torch.equal(case.logits(model), case.logits())  # zeros where it was cut
    head = fields(tmp_path / "export")
    assert head["general.architecture"] == "deci"
    assert head["deci.attention.head_count"] == [2, 0, 4]
    assert head["deci.attention.head_count_kv"] == [1, 0, 2]
    assert head["deci.feed_forward_length"] == [64, 96, 32]
    names = set(tensors(tmp_path / "export"))
    assert not any(re.match(r"blk\.1\.attn", name) for name in names)
    assert "blk.1.ffn_norm.weight" in names
    assert exporter_of(case).bounds(case.job.storages) == EXACT
    notes = exporter_of(case).notes(case.job.storages)
    assert notes[:3] == [
        "left out the attention of blocks 1",
        "cut groups of heads: 1 to 2 of 2 stay in a block",
        "cut channels: 32 to 96 of 96 stay in a block",
    ]
    assert "deci" in notes[3]


def test_a_dropped_block_beside_different_widths(tmp_path: Path) -> None:
    policy = {"blocks.0.block": "drop", "blocks.2.mlp": HALF}
    case = gguf_case("llama", tmp_path / "dense", policy)
    model, _ = export_of(case, tmp_path / "export")
    assert len(model.model.layers) == 3
    assert torch.equal(case.logits(model), case.logits())
    assert fields(tmp_path / "export")["deci.feed_forward_length"] == [96, 64]
    state = case.model.state_dict()
    kept = state["model.layers.2.mlp.down_proj.weight"].any(0)
    found = tensors(tmp_path / "export")["blk.1.ffn_down.weight"]
    wanted = state["model.layers.2.mlp.down_proj.weight"][:, kept]
    assert torch.equal(found.to(torch.bfloat16), wanted)


def test_a_number_of_heads_that_the_class_refuses_loads_whole(tmp_path: Path) -> None:
    policy = everywhere("attention", "heads(keep=0.75, score=magnitude)")
    changes = {"num_key_value_heads": 4}
    case = gguf_case("llama", tmp_path / "dense", policy, **changes)
    model, _ = export_of(case, tmp_path / "export")
    assert torch.equal(case.logits(model), case.logits())
    head = fields(tmp_path / "export")
    assert head["llama.attention.head_count"] == 3
    assert head["llama.attention.key_length"] == 16


def biased(case: Case, role: str) -> Case:
    """Add a bias to the layers of a role, as FLAP does."""
    variants = {la: case.job.variant(la) for la in case.job.storages}
    for layer in variants:
        if layer.role == role:
            bias = torch.linspace(-1, 1, layer.shape[0])
            variants[layer] = variants[layer].biased(bias)
            case.model.get_submodule(layer.name).bias = torch.nn.Parameter(
                bias.to(torch.bfloat16), requires_grad=False
            )
    storages = {layer: variant.storage for layer, variant in variants.items()}
    job = replace(case.job, storages=storages, variant=variants.__getitem__)
    return replace(case, job=job)


@pytest.mark.parametrize("policy", [{}, UNEVEN, everywhere("mlp", HALF)])
@pytest.mark.parametrize("role", ["q_proj", "down_proj", "up_proj"])
def test_added_biases(role: str, policy: dict[str, str], tmp_path: Path) -> None:
    if role == "q_proj" and policy is UNEVEN:
        policy = {k: v for k, v in UNEVEN.items() if k != "blocks.1.attention"}
    case = biased(gguf_case("llama", tmp_path / "dense", policy), role)
    model, _ = export_of(case, tmp_path / "export")
    wanted, found = case.logits(), case.logits(model)
    if policy and role == "up_proj":  # biases of channels that went stay in memory
        assert found.shape == wanted.shape
    else:
        assert torch.equal(found, wanted)
    names = [n for n in tensors(tmp_path / "export") if n.endswith("bias")]
    assert len(names) == 3


def test_own_biases_stay(tmp_path: Path) -> None:
    settings = {"attention_bias": True, "mlp_bias": True}
    policy = everywhere("attention", HEAD)
    case = gguf_case("llama", tmp_path / "dense", policy, **settings)
    model, _ = export_of(case, tmp_path / "export")
    torch.testing.assert_close(case.logits(model), case.logits(), rtol=0.1, atol=0.05)
    found = tensors(tmp_path / "export")
    state = model.state_dict()
    bias = state["model.layers.1.self_attn.q_proj.bias"].float()
    assert torch.equal(found["blk.1.attn_q.bias"], in_pairs(bias[:, None])[:, 0])
    for name in found:
        wanted = state[hf_name(name)].float()
        if not re.search(r"attn_[qk]\.", name):
            assert torch.equal(found[name], wanted), name


def test_pieces_for_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = piece_tokenizer(space=True)
    case = gguf_case("mistral", tmp_path / "dense", tokenizer=tokenizer)
    export_of(case, tmp_path / "export")
    assert fields(tmp_path / "export")["tokenizer.ggml.model"] == "llama"


def storage_of(case: Case, role: str, **changes: Any) -> tuple[Layer, Storage]:
    layer = next(la for la in case.job.storages if la.role == role)
    return layer, replace(case.job.storages[layer], **changes)


INT4: dict[str, Any] = {"bits": 4, "group": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**INT4, "group": 16}, "rows of 64 in groups of 16"),
        ({**INT4, "bits": 8, "symmetric": False}, "8 bits with zero points span more"),
        ({**INT4, "code": "nf4"}, "no type for nf4"),
        ({**INT4, "bits": 8, "code": "fp8_e4m3"}, "no type for fp8_e4m3"),
        ({**INT4, "code": "nvfp4", "group": 16}, "no type for nvfp4"),
        ({**INT4, "code": "int_float_zero", "mask": "2:4"}, "are no whole numbers"),
        ({**INT4, "channel_scales": True}, "no place for scales of inputs"),
        ({"low_rank": 4}, "no place for factors of low rank"),
        ({"hidden": 32}, "does not rotate"),
    ],
)
def test_layers_that_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = gguf_case("llama", tmp_path / "dense")
    layer, storage = storage_of(case, "q_proj", **changes)
    reason = exporter_of(case).refuses(layer, storage)
    assert reason and re.search(message, reason), reason
    storages = {**case.job.storages, layer: storage}
    exporter_of(case).size_bytes(storages, case.untouched)  # tells one all the same
    job = replace(case.job, storages=storages)
    with pytest.raises(ExportError, match=rf"cannot export .*q_proj: .*{message}"):
        exporter_of(case).write(tmp_path, job)


def test_groups_that_cut_columns_tear_apart_are_refused(tmp_path: Path) -> None:
    case = gguf_case("llama", tmp_path / "dense")
    exporter = exporter_of(case)
    cut = {"units": 64, "mask": "64x1", "kept": 64 * 64}
    layer, storage = storage_of(case, "down_proj", **INT4, **cut)
    assert "no longer stand together" in str(exporter.refuses(layer, storage))
    whole = replace(storage, group=None)
    assert exporter.refuses(layer, whole) is None
    odd = replace(whole, units=48)
    assert "rows of 48 in groups of a row" in str(exporter.refuses(layer, odd))
    plain = replace(odd, bits=None)
    assert exporter.refuses(layer, plain) is None


def test_biases_without_a_place_are_refused(tmp_path: Path) -> None:
    case = gguf_case("qwen3", tmp_path / "dense")
    layer, storage = storage_of(case, "down_proj", bias=True)
    reason = exporter_of(case).refuses(layer, storage)
    assert reason == "llama.cpp's qwen3 has no place for a bias of down_proj"


@pytest.mark.parametrize(
    ("kind", "policy", "message"),
    [
        (
            "llama",
            {"blocks.1.mlp": "drop"},
            r"blocks.1 keeps its attention but no MLP.* Drop the block as a whole",
        ),
        (
            "llama",
            {"blocks.0.block": "drop", "blocks.1.attention": "drop"},
            r"blocks.1, the first that stays, has no attention",
        ),
        ("llama", everywhere("block", "drop"), "the model, the first that stays"),
        ("qwen2", {"blocks.1.mlp": HALF}, "llama.cpp's qwen2 has one for all"),
        ("qwen3", {"blocks.1.attention": HEAD}, "llama.cpp's qwen3 has one for all"),
        ("qwen2", everywhere("attention", HEAD), "qwen2 wants as many heads"),
    ],
    ids=["mlp", "first", "all", "qwen2", "qwen3", "heads"],
)
def test_policies_that_are_refused(
    kind: str, policy: dict[str, str], message: str, tmp_path: Path
) -> None:
    case = gguf_case(kind, tmp_path / "dense", policy)
    exporter = exporter_of(case)
    reason = exporter.refuses_policy(case.job.storages, case.job.inventory)
    assert reason and re.search(message, reason), reason
    assert exporter.size_bytes(case.job.storages, case.untouched) > 0
    with pytest.raises(ExportError, match=message):
        exporter.write(tmp_path, case.job)


def test_heads_of_qwen3_may_go(tmp_path: Path) -> None:
    case = gguf_case("qwen3", tmp_path / "dense", everywhere("attention", HEAD))
    export_of(case, tmp_path / "export")
    assert fields(tmp_path / "export")["qwen3.attention.head_count"] == 2


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"gemma3"}))
def test_models_without_a_gguf_are_refused_and_have_a_size(
    kind: str, tmp_path: Path
) -> None:
    """Every exporter meets every model: sizes are told of all targets."""
    from tiny_exports import tiny_case

    case = tiny_case(kind, tmp_path / "dense", ["dense"])  # without a tokenizer
    exporter = exporter_of(case)
    layer, storage = next(iter(case.job.storages.items()))
    reason = str(exporter.refuses(layer, storage))
    written = kind in ("llama", "mistral", "qwen2", "qwen3")
    assert ("has no tokenizer" if written else f"not {kind!r}") in reason
    assert exporter.refuses_policy(case.job.storages, case.job.inventory) == reason
    assert exporter.size_bytes(case.job.storages, case.untouched) > 0
    assert exporter.layer_bytes(layer, storage) > 0
    assert exporter.notes(case.job.storages) == []
    with pytest.raises(ExportError, match="cannot export"):
        exporter.write(tmp_path, case.job)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "its hidden_act is 'gelu'"),
        ("qwen2", {"head_dim": 32}, "its head_dim is 32"),
        ("qwen3", {"attention_bias": True}, "no place for its tensor .*o_proj.bias"),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "rope_type": "dynamic"}},
            "of the type 'dynamic', written are default, linear, llama3",
        ),
        ("qwen3", {"rope_parameters": LLAMA3}, "type 'llama3', written are default, l"),
        ("llama", {"dtype": torch.float64}, "tensors in float64"),
        ("llama", {"vocab_size": 200}, r"has ids up to \d+, the embedding 200 rows"),
    ],
)
def test_settings_that_llama_cpp_has_not_are_refused(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = gguf_case(kind, tmp_path / "dense", **changes)
    layer, storage = next(iter(case.job.storages.items()))
    reason = exporter_of(case).refuses(layer, storage)
    assert reason and re.search(message, reason), reason


def test_scales_beyond_float16_are_an_error(tmp_path: Path) -> None:
    case = gguf_case("llama", tmp_path / "dense", {"blocks.0.o": EIGHT})
    layer = next(la for la in case.job.storages if la.role == "o_proj")
    made = case.job.variant(layer)
    assert made.scales is not None
    for factor in (2.0**30, 2.0**-22):
        other = replace(made, scales=made.scales * factor)

        def variant(one: Layer, other: Variant = other) -> Variant:
            return other if one == layer else case.job.variant(one)

        job = replace(case.job, variant=variant)
        (tmp_path / str(factor)).mkdir()
        with pytest.raises(ExportError, match=r"o_proj do not fit the float16 of .*Q8"):
            exporter_of(case).write(tmp_path / str(factor), job)


def test_variants_that_break_their_contract_are_an_error(tmp_path: Path) -> None:
    case = gguf_case("llama", tmp_path / "dense", {"*": RTN, **everywhere("mlp", HALF)})
    (tmp_path / "export").mkdir()
    wrong = {la: case.job.variant(la) for la in case.job.storages}
    layer = next(la for la in wrong if la.role == "down_proj")
    mask = wrong[layer].mask
    assert mask is not None
    wrong[layer] = replace(wrong[layer], mask=mask.roll(1, 1))
    job = replace(case.job, variant=wrong.__getitem__)
    with pytest.raises(ExportError, match="keeps 64 units, but 64 were declared"):
        exporter_of(case).write(tmp_path / "export", job)
    wrong = {la: case.job.variant(la) for la in case.job.storages}
    other = next(la for la in wrong if la.role == "q_proj")
    wrong[other] = Variant.dense(wrong[other].weight)
    job = replace(case.job, variant=wrong.__getitem__)
    with pytest.raises(ExportError, match=r"q_proj' stores .* breaks its contract"):
        exporter_of(case).write(tmp_path / "export", job)


def cut_file(folder: Path) -> None:
    data = (folder / MODEL_FILE).read_bytes()
    (folder / MODEL_FILE).write_bytes(data[: len(data) // 2])


def change_json(folder: Path, name: str, **changes: Any) -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize("policy", [{}, UNEVEN], ids=["plain", "whole"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / MODEL_FILE).unlink(), r"cannot read .*model.gguf"),
        (cut_file, r"cannot read .*model.gguf"),
        (lambda f: (f / "config.json").unlink(), r"cannot read .*config.json"),
        (lambda f: (f / MARKER).unlink(), "cannot read"),
        (lambda f: change_json(f, MARKER, whole="no"), "'whole' is 'no'"),
        (
            lambda f: change_json(f, "config.json", intermediate_size=8),
            "cannot|parts",
        ),
        (lambda f: change_json(f, "config.json", num_hidden_layers=4), "cannot|parts"),
        (lambda f: change_json(f, "config.json", num_hidden_layers=2), "has|parts"),
    ],
)
def test_damage_is_told(
    damage: Callable[[Path], object],
    message: str,
    policy: dict[str, str],
    tmp_path: Path,
) -> None:
    case = gguf_case("llama", tmp_path / "dense", policy)
    (tmp_path / "export").mkdir()
    exporter_of(case).write(tmp_path / "export", case.job)
    damage(tmp_path / "export")
    with pytest.raises(ExportError, match=message):
        GgufFile().load(tmp_path / "export")


def test_a_tensor_without_a_place_is_told(tmp_path: Path) -> None:
    """As transformers says nothing of biases that its configuration does not have."""
    case = gguf_case("llama", tmp_path / "dense", attention_bias=True)
    (tmp_path / "export").mkdir()
    exporter_of(case).write(tmp_path / "export", case.job)
    change_json(tmp_path / "export", "config.json", attention_bias=False)
    with pytest.raises(ExportError, match="has 42 tensors, config.json asks for 30"):
        GgufFile().load(tmp_path / "export")


def test_a_loaded_model_can_be_saved_and_trained_on(tmp_path: Path) -> None:
    case = gguf_case("llama", tmp_path / "dense")
    model, _ = export_of(case, tmp_path / "export")
    model.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again", dtype=model.dtype)
    assert torch.equal(case.logits(again), case.logits())
    assert not model.training
    whole = gguf_case("mistral", tmp_path / "other")
    made, _ = export_of(whole, tmp_path / "whole")
    assert isinstance(made, MistralForCausalLM) and not made.training


def test_a_model_of_no_folder_is_refused(tmp_path: Path) -> None:
    case = gguf_case("llama", tmp_path / "dense")
    exporter = GgufFile().for_model(tiny("llama", **SIZES), case.job.inventory)
    layer, storage = next(iter(case.job.storages.items()))
    reason = exporter.refuses(layer, storage)
    assert reason == "the model was not loaded from a folder with a tokenizer"


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [False, pytest.param(True, marks=pytest.mark.ci)])
def test_a_fresh_process_agrees(uneven: bool, tmp_path: Path) -> None:
    gguf_case("llama", tmp_path / "dense")
    space = [{"actions": [RTN, "rtn(bits=5, group=32)"]}]
    if uneven:
        space = [{"sites": "blocks.1.mlp", "actions": [f"{HALF} + {EIGHT}"]}, *space]
    config = config_of(
        tmp_path / "dense",
        write_text(tmp_path),
        space=space,
        objective={},
        export="gguf",
    )
    plan = Plan.make(config, load_plugins(), cache=tmp_path)
    names = [site.name for site in plan.problem.space.sites]
    policy = {name: Action.parse("dense") for name in names}
    policy["blocks.0.qkv"] = Action.parse(RTN)
    policy["blocks.2.down"] = Action.parse("rtn(bits=5, group=32)")
    if uneven:
        policy["blocks.1.mlp"] = Action.parse(f"{HALF} + {EIGHT}")
    plan.bank.make(plan.pairs)
    report = export_policy(
        plan.bench,
        plan.bank,
        Policy(policy),
        place=tmp_path / "export",
        target="gguf",
        record={},
        plugins=[],
        force=False,
    )
    assert report.size_bytes == report.metrics["size_bytes"]
    assert (tmp_path / "export" / MODEL_FILE).stat().st_size == report.size_bytes
    assert report.verified is not None and report.verified.layers == 22
    assert report.usage == f"llama-cli -m {tmp_path}/export/model.gguf"
    assert ("deci" in " ".join(report.notes)) is uneven
    model = autoprune.load(tmp_path / "export")
    assert isinstance(model, LlamaForCausalLM)
