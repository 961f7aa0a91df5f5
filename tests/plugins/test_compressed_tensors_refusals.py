"""What targets in compressed-tensors refuse, and what they say of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from autoprune_plugins.compressed_tensors_folder import (
    CompressedTensors,
    CompressedTensorsVllm,
)
from safetensors.torch import load_file, save_file
from tiny_codes import coded_case, export_of, layer_of, storage_of

from autoprune.compression.storage import Storage
from autoprune.errors import ExportError
from autoprune.exporting.exporter import Exporter
from autoprune.policy import Layer
from autoprune.targets import compressed_tensors_schemes

SERVED, VLLM = CompressedTensors(), CompressedTensorsVllm()
W4 = "rtn(bits=4, group=32, symmetric=true)"
W8 = "rtn(bits=8, group=64, symmetric=true)"
ROW = "rtn(bits=4, symmetric=true)"
HALF = "channels(keep=0.5, score=magnitude)"


def test_a_cut_does_not_part_what_shares_a_scale(tmp_path: Path) -> None:
    policy = {f"blocks.{block}.mlp": f"{HALF} + {W4}" for block in (0, 1)}
    case = coded_case("llama", tmp_path / "dense", policy)
    exporter = VLLM.for_model(case.dense, case.job.inventory)
    reason = exporter.refuses_policy(case.job.storages, case.job.inventory)
    assert reason is not None
    assert "removing channels cuts the columns of model.layers.0.mlp.down" in reason
    assert "32 in a row share a scale" in reason and "one scale a row" in reason


def test_a_cut_leaves_a_width_that_kernels_take(tmp_path: Path) -> None:
    action = f"channels(keep=0.125, score=magnitude) + {ROW}"
    policy = {f"blocks.{block}.mlp": action for block in (0, 1)}
    case = coded_case("llama", tmp_path / "dense", policy)
    exporter = VLLM.for_model(case.dense, case.job.inventory)
    reason = exporter.refuses_policy(case.job.storages, case.job.inventory)
    assert reason is not None and "down_proj, cut to 16 inputs" in reason
    assert "no multiple of 32" in reason


def test_fused_layers_are_stored_alike(tmp_path: Path) -> None:
    case = coded_case("llama", tmp_path / "dense", {}, every=W4)
    q = layer_of(case, "0.self_attn.q_proj")
    storages = {**case.job.storages, q: storage_of(q, W8)}
    exporter = SERVED.for_model(case.dense, case.job.inventory)
    reason = exporter.refuses_policy(storages, case.job.inventory)
    assert reason is not None and "blocks.0.qkv" in reason and "4 bits" in reason


def _narrow(storage: Storage) -> Storage:
    return replace(storage, shape=(64, 48), kept=64 * 48)


REFUSALS: dict[str, tuple[str, Callable[[Storage], Storage], str]] = {
    "zero points": ("rtn(bits=4, group=32)", lambda s: s, "packed zero points"),
    "NF4": ("nf4", lambda s: s, "no format for NF4"),
    "hqq": ("hqq(bits=4, group=32)", lambda s: s, "not whole numbers"),
    "a tensor's scale": (
        W4,
        lambda s: replace(s, code="int_tensor", group=None),
        "one scale for a whole matrix",
    ),
    "scales of inputs": (
        W4,
        lambda s: replace(s, channel_scales=True),
        "a scale of each input",
    ),
    "low rank": (W4, lambda s: s.factored(4), "a product of low rank"),
    "fp8 in groups": ("fp8(group=32)", lambda s: s, "found groups of 32"),
    "small groups": (
        "rtn(bits=4, group=16, symmetric=true)",
        lambda s: s,
        "groups of 32, 64 or 128 or a whole row, found 16",
    ),
    "groups that do not divide": (
        W4,
        _narrow,
        "48 inputs are no multiple of 32, as W4A16 in groups of 32",
    ),
    "rows of no whole words": (ROW, _narrow, "48 inputs are no multiple of 32"),
    "float16": (
        "nvfp4",
        lambda s: replace(s, dtype="float16"),
        "nvfp4 back as bfloat16 .* model in float16",
    ),
    "directions": (
        "dense",
        lambda s: replace(s, hidden=32),
        "does not rotate; the target transformers does",
    ),
}


@pytest.mark.parametrize("target", [SERVED, VLLM], ids=lambda t: t.name)
@pytest.mark.parametrize(("action", "change", "match"), REFUSALS.values(), ids=REFUSALS)
def test_what_runtimes_do_not_read_is_refused(
    target: Exporter, action: str, change: Callable[[Storage], Storage], match: str
) -> None:
    layer = Layer("model.layers.0.mlp.up_proj", (64, 64), "bfloat16", 0, "up", None)
    storage = change(storage_of(layer, action))
    layer = replace(layer, shape=storage.shape)
    reason = target.refuses(layer, storage)
    assert reason is not None
    with pytest.raises(ExportError, match=match):
        raise ExportError(reason)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_odd_bits_are_for_vllm_alone(bits: int) -> None:
    layer = Layer("model.layers.0.mlp.up_proj", (64, 64), "bfloat16", 0, "up", None)
    storage = storage_of(layer, f"rtn(bits={bits}, group=32, symmetric=true)")
    assert VLLM.refuses(layer, storage) is None
    reason = SERVED.refuses(layer, storage)
    assert reason is not None and f"4 or 8 bits, found {bits}" in reason
    assert "compressed-tensors-vllm" in reason


def test_mxfp4_is_for_vllm_alone() -> None:
    layer = Layer("model.layers.0.mlp.up_proj", (64, 64), "bfloat16", 0, "up", None)
    assert VLLM.refuses(layer, storage_of(layer, "mxfp4")) is None
    reason = SERVED.refuses(layer, storage_of(layer, "mxfp4"))
    assert reason is not None and "SGLang 0.5.23 has no MXFP4" in reason


@pytest.mark.parametrize(
    ("kind", "site", "match"),
    [
        ("gpt2", "blocks.0.qkv", "no quantized Conv1D"),
        ("llama", "embedding", "quantized embedding"),
        ("mixtral", "blocks.0.qkv", "its experts one by one"),
        ("mixtral", "blocks.0.experts.down", "all experts in one parameter"),
    ],
)
def test_layers_that_transformers_does_not_read_are_refused(
    kind: str, site: str, match: str, tmp_path: Path
) -> None:
    case = coded_case(kind, tmp_path / "dense", {})
    exporter = VLLM.for_model(case.dense, case.job.inventory)
    sites = {one.name: one for one in case.job.inventory.sites}
    layer = sites[site].layers[0]
    reason = exporter.refuses(layer, storage_of(layer, W4))
    assert reason is not None and match in reason
    assert exporter.refuses(layer, Storage.dense(layer)) is None
    job = replace(
        case.job, storages={**case.job.storages, layer: storage_of(layer, W4)}
    )
    with pytest.raises(ExportError, match=f"cannot hold {layer.name[:20]}.*{match}"):
        exporter.write(tmp_path, job)


def test_without_the_library_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = coded_case("llama", tmp_path / "dense", {}, every=W4)
    export_of(case, tmp_path / "export", VLLM)
    monkeypatch.setattr(compressed_tensors_schemes, "find_spec", lambda name: None)
    layer, storage = next(iter(case.job.storages.items()))
    install = r"pip install 'autoprune\[export\]'"
    assert "autoprune[export]" in str(VLLM.refuses(layer, storage))
    assert "autoprune[export]" in str(
        VLLM.refuses_policy(case.job.storages, case.job.inventory)
    )
    with pytest.raises(ExportError, match=install):
        VLLM.load(tmp_path / "export")
    with pytest.raises(ExportError, match=install):
        VLLM.write(tmp_path, case.job)


def test_damage_is_told(tmp_path: Path) -> None:
    case = coded_case("llama", tmp_path / "dense", {}, every=W4)
    export_of(case, tmp_path / "export", VLLM)
    with pytest.raises(ExportError, match="'compressed-tensors-vllm', not 'compres"):
        SERVED.load(tmp_path / "export")
    file = tmp_path / "export/model.safetensors"
    tensors = load_file(file)
    lost = "model.layers.1.mlp.up_proj.weight_packed"
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ExportError, match=f"missing, first '{lost}'"):
        VLLM.load(tmp_path / "export")
