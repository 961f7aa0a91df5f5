"""Targets in compressed-tensors: what is stored, refused, and what comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.compressed_tensors_folder import (
    CompressedTensors,
    CompressedTensorsVllm,
)
from safetensors import safe_open
from tiny_codes import (
    WIDE,
    coded_case,
    export_of,
    layer_of,
    storage_of,
    with_variants,
)
from tiny_models import CONFIGS

from autoprune.exporting.exporter import EXACT
from autoprune.models.layers import read_weight

SERVED, VLLM = CompressedTensors(), CompressedTensorsVllm()
W4 = "rtn(bits=4, group=32, symmetric=true)"
W8 = "rtn(bits=8, group=64, symmetric=true)"
ROW = "rtn(bits=4, symmetric=true)"
HALF = "channels(keep=0.5, score=magnitude)"
HEAD = "heads(keep=0.5, score=magnitude)"
EXACT_FORMS = {
    "W4A16 in groups": W4,
    "W4A16 per row": ROW,
    "W8A16": W8,
    "W3A16": "rtn(bits=3, group=32, symmetric=true)",
    "W7A16 per row": "rtn(bits=7, symmetric=true)",
    "NVFP4A16": "nvfp4",
    "MXFP4A16": "mxfp4",
    "2:4 before W4A16": f"magnitude(pattern=2:4) + {W4}",
    "values with zeros": "magnitude(sparsity=0.3)",
}
ROUNDED_FORMS = {
    "W8A8": "int8_dynamic",
    "FP8 a row": "fp8",
    "FP8 a tensor": "fp8(per=tensor)",
}


@pytest.mark.parametrize("action", EXACT_FORMS.values(), ids=EXACT_FORMS)
def test_weights_come_back_bit_for_bit(action: str, tmp_path: Path) -> None:
    case = coded_case("llama", tmp_path / "dense", {}, every=action)
    model, _, _ = export_of(case, tmp_path / "export", VLLM)
    for layer in case.job.storages:
        assert torch.equal(read_weight(model, layer), read_weight(case.model, layer))
    assert torch.equal(case.logits(model), case.logits())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("action", ROUNDED_FORMS.values(), ids=ROUNDED_FORMS)
def test_activations_are_rounded_and_weights_are_not(
    action: str, tmp_path: Path
) -> None:
    case = coded_case("llama", tmp_path / "dense", {}, every=action)
    model, config, notes = export_of(case, tmp_path / "export", SERVED)
    found, wanted = case.logits(model), case.logits()
    assert not torch.equal(found, wanted)
    assert (found - wanted).abs().mean() < 0.15 * wanted.std()
    q = layer_of(case, "q_proj")
    apart = (read_weight(model, q) - read_weight(case.model, q)).abs()
    step = 2**-7 if "tensor" in action else 0.0  # as the scale becomes a bfloat16
    assert (apart <= step * read_weight(case.model, q).abs()).all()
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["dynamic"] is True
    assert group["weights"]["strategy"] in ("channel", "tensor")
    assert any("activations rounded to 8 bits" in note for note in notes)


def test_bounds_tell_what_is_computed_in_another_way(tmp_path: Path) -> None:
    case = coded_case("llama", tmp_path / "dense", {})
    exporter = VLLM.for_model(case.dense, case.job.inventory)

    def bounds(text: str) -> Any:
        inside = {la for la in case.job.storages if la.block is not None}
        return exporter.bounds({layer: storage_of(layer, text) for layer in inside})

    assert bounds(W4) == bounds("mxfp4") == bounds("dense") == EXACT
    assert bounds("nvfp4").why and bounds("nvfp4").logits is not None
    assert bounds("fp8").logits is bounds("int8_dynamic").logits is None
    assert "integers of 8 bits" in bounds("int8_dynamic").why
    assert EXACT.perplexity < bounds("fp8").perplexity < 0.1
    dropped = {
        layer: storage_of(layer, W4 if layer.block else "drop")
        for layer in case.job.storages
    }
    assert exporter.bounds(dropped).why == "fewer zeros are added, in another order"


def test_the_file_holds_what_the_library_packs(tmp_path: Path) -> None:
    case = coded_case("llama", tmp_path / "dense", {}, every=W4)
    export_of(case, tmp_path / "export", VLLM)
    down = layer_of(case, "0.mlp.down_proj")
    variant = case.job.variant(down)
    with safe_open(tmp_path / "export/model.safetensors", "pt") as file:
        stored = {
            name.rpartition(".")[2]: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 - no mapping
            if name.startswith(f"{down.name}.")
        }
    assert stored.keys() == {"weight_packed", "weight_scale", "weight_shape"}
    assert stored["weight_shape"].tolist() == [64, 128]
    assert torch.equal(stored["weight_scale"], variant.scales)
    # Eight codes of four bits a word, the first in its lowest bits.
    words = stored["weight_packed"].long() & 0xFFFFFFFF
    codes = torch.stack([(words >> 4 * i) & 0xF for i in range(8)], -1)
    assert torch.equal(codes.view(64, 128), variant.codes.long())


def test_zeros_of_a_mask_are_the_code_of_zero(tmp_path: Path) -> None:
    action = f"magnitude(pattern=2:4) + {W4}"
    case = coded_case("llama", tmp_path / "dense", {}, every=action)
    model, _, notes = export_of(case, tmp_path / "export", VLLM)
    for layer, storage in case.job.storages.items():
        if storage.mask is not None:
            zeros = (read_weight(model, layer) == 0).view(-1, 4).sum(1)
            assert (zeros >= 2).all()
    assert "14 pruned layers keep their zeros at full size" in notes


def test_one_config_group_a_scheme_and_all_else_ignored(tmp_path: Path) -> None:
    policy = {
        "blocks.0.qkv": "int8_dynamic",
        "blocks.0.gate_up": W4,
        "blocks.1.qkv": W8,
        "blocks.1.gate_up": W4,
    }
    case = coded_case("qwen2", tmp_path / "dense", policy)
    _, config, notes = export_of(case, tmp_path / "export", SERVED)
    found = config["quantization_config"]
    assert found["format"] == "mixed-precision"
    assert found["quantization_status"] == "compressed"
    assert found["quant_method"] == "compressed-tensors"
    groups = {
        (g["format"], g["weights"]["num_bits"]): g["targets"]
        for g in found["config_groups"].values()
    }
    gates = [f"model.layers.{b}.mlp.{p}_proj" for b in (0, 1) for p in ("gate", "up")]
    assert groups.keys() == {
        ("int-quantized", 8),
        ("pack-quantized", 8),
        ("pack-quantized", 4),
    }
    assert sorted(groups["pack-quantized", 4]) == gates
    rest = [f"model.layers.{b}.{n}" for b in (0, 1) for n in _ENDS]
    assert sorted(found["ignore"]) == sorted(["lm_head", *rest])
    assert "3 layers W8A8, 4 layers W4A16, 3 layers W8A16" in notes


_ENDS = ("self_attn.o_proj", "mlp.down_proj")


def test_nothing_quantized_is_a_plain_folder(tmp_path: Path) -> None:
    case = coded_case("llama", tmp_path / "dense", {})
    model, config, notes = export_of(case, tmp_path / "export", VLLM)
    assert "quantization_config" not in config
    assert torch.equal(case.logits(model), case.logits())
    assert "nothing is quantized: a plain folder" in notes


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "smollm3", "olmo2"])
def test_architectures_of_linear_layers_come_back(kind: str, tmp_path: Path) -> None:
    dtype = torch.float16 if kind == "qwen2" else torch.float32
    case = coded_case(kind, tmp_path / "dense", {}, every=W4, dtype=dtype)
    model, _, _ = export_of(case, tmp_path / "export", SERVED)
    assert model.dtype == dtype and type(model) is type(case.dense)
    assert torch.equal(case.logits(model), case.logits())


def test_other_names_on_disk_are_targets_too(tmp_path: Path) -> None:
    text = {**CONFIGS["gemma3"]["text_config"], **WIDE}
    case = coded_case("gemma3", tmp_path / "dense", {}, every=W4, text_config=text)
    model, config, _ = export_of(case, tmp_path / "export", SERVED)
    assert torch.equal(case.logits(model), case.logits())
    (group,) = config["quantization_config"]["config_groups"].values()
    names = ("model.language_model.layers", "language_model.model.layers")
    for name in names:
        assert f"{name}.0.self_attn.q_proj" in group["targets"]
    ignored = config["quantization_config"]["ignore"]
    assert any("vision_tower" in name for name in ignored)
    assert not any("embed_tokens" in name for name in ignored)


def test_files_are_divided_and_found_again(tmp_path: Path) -> None:
    class Small(CompressedTensorsVllm):
        shard_bytes = 20_000

    case = coded_case("llama", tmp_path / "dense", {}, every=W4)
    model, _, _ = export_of(case, tmp_path / "export", Small())
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 2
    assert torch.equal(case.logits(model), case.logits())


def test_a_dropped_block_is_left_out(tmp_path: Path) -> None:
    policy = {"blocks.1.block": "drop"}
    case = coded_case(
        "llama", tmp_path / "dense", policy, every=W4, num_hidden_layers=3
    )
    model, config, notes = export_of(case, tmp_path / "export", VLLM)
    assert config["num_hidden_layers"] == 2
    (group,) = config["quantization_config"]["config_groups"].values()
    assert len(group["targets"]) == 14 and not any(".2." in t for t in group["targets"])
    assert torch.equal(case.logits(model), case.logits())
    assert "left out blocks 1 of 3, counted from 0" in notes


@pytest.mark.parametrize(
    ("structure", "action", "width"),
    [("mlp", f"{HALF} + {ROW}", 64), ("attention", f"{HEAD} + {W4}", 32)],
    ids=["channels with a scale a row", "heads of whole groups"],
)
def test_cut_codes_are_the_codes_that_stay(
    structure: str, action: str, width: int, tmp_path: Path
) -> None:
    policy = {f"blocks.{block}.{structure}": action for block in (0, 1)}
    case = coded_case(
        "llama", tmp_path / "dense", policy, every=W4, dtype=torch.float32
    )
    model, _, notes = export_of(case, tmp_path / "export", VLLM)
    torch.testing.assert_close(case.logits(model), case.logits(), rtol=1e-4, atol=1e-5)
    end = "mlp.down_proj" if structure == "mlp" else "self_attn.o_proj"
    small = model.get_submodule(f"model.layers.1.{end}").weight
    assert small.shape == (64, width)
    full = read_weight(case.model, layer_of(case, f"1.{end}"))
    assert torch.equal(small, full[:, full.any(0)])
    assert any(note.startswith("cut ") for note in notes)


def test_a_bias_is_added_where_the_model_has_a_place(tmp_path: Path) -> None:
    case = coded_case("llama", tmp_path / "dense", {}, every=W4, dtype=torch.float32)
    down = layer_of(case, "1.mlp.down_proj")
    added = torch.linspace(-1, 1, 64)
    variants = {layer: case.job.variant(layer) for layer in case.job.storages}
    case = with_variants(case, {**variants, down: variants[down].biased(added)})
    model, config, notes = export_of(case, tmp_path / "export", VLLM)
    assert config["mlp_bias"] is True
    assert torch.equal(model.get_submodule(down.name).bias, added)
    assert torch.equal(case.logits(model), case.logits())
    assert any("get a bias" in note for note in notes)


def test_dense_experts_are_a_plain_folder(tmp_path: Path) -> None:
    case = coded_case("mixtral", tmp_path / "dense", {})
    model, _, _ = export_of(case, tmp_path / "export", VLLM)
    assert torch.equal(case.logits(model), case.logits())


def test_sizes_are_told_without_a_model(tmp_path: Path) -> None:
    case = coded_case("llama", tmp_path / "dense", {}, every=W4)
    bound = VLLM.for_model(case.dense, case.job.inventory)
    size = bound.size_bytes(case.job.storages, case.untouched)
    assert VLLM.size_bytes(case.job.storages, case.untouched) == size
