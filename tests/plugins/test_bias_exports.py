"""Biases that variants add are stored, counted to the byte, and come back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from autoprune_plugins.packed import Packed
from autoprune_plugins.transformers_folder import TransformersFolder
from tiny_exports import Case
from tiny_sites import site_case

from autoprune.errors import ExportError
from autoprune.exporting.exporter import Exporter

PACKED, PLAIN = Packed(), TransformersFolder()
FLAP = "flap(keep=0.5)"
BARE = "flap(keep=0.5, bias=false)"
RTN = " + rtn(bits=8, group=8)"


def export_of(
    case: Case, folder: Path, exporter: Exporter
) -> tuple[Any, dict[str, Any], list[str]]:
    """Write and load; the size is the predicted one, and prices bound it."""
    folder.mkdir()
    exporter = exporter.for_model(case.dense, case.job.inventory)
    assert not any(exporter.refuses(la, s) for la, s in case.job.storages.items())
    exporter.write(folder, case.job)
    predicted = exporter.size_bytes(case.job.storages, case.untouched)
    assert exporter.written_bytes(folder) == predicted
    prices = [exporter.layer_bytes(la, s) for la, s in case.job.storages.items()]
    assert predicted <= exporter.size_bytes({}, case.untouched) + sum(prices)
    config = json.loads((folder / "config.json").read_text())
    return exporter.load(folder), config, exporter.notes(case.job.storages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "sites"),
    [
        ("llama", ("mlp", "attention")),
        ("qwen2", ("mlp", "attention")),
        ("mixtral", ("attention",)),
        ("gpt2", ("mlp",)),
        ("opt", ("mlp", "attention")),
        ("bert", ("mlp", "attention")),
    ],
)
def test_packed_stores_them_beside_the_weight(
    kind: str, sites: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    policy = {f"blocks.1.{site}": FLAP + RTN for site in sites}
    case = site_case(kind, tmp_path / "dense", policy, dtype=dtype)
    bare = site_case(
        kind,
        tmp_path / "bare",
        {name: BARE + RTN for name in policy},
        dtype=dtype,
    )
    assert not torch.allclose(case.logits(), bare.logits())  # the bias has an effect
    model, _, _ = export_of(case, tmp_path / "export", PACKED)
    assert torch.equal(case.logits(model), case.logits())
    biases = sum(
        32 * dtype.itemsize for storage in case.job.storages.values() if storage.bias
    )
    more, less = (sum(s.nbytes for s in c.job.storages.values()) for c in (case, bare))
    assert more - less == biases == 32 * dtype.itemsize * len(sites)


@pytest.mark.parametrize(
    ("site", "setting", "covered"),
    [
        ("mlp", "mlp_bias", ("gate_proj", "up_proj", "down_proj")),
        ("attention", "attention_bias", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_llama_is_given_a_place_for_them(
    site: str,
    setting: str,
    covered: tuple[str, ...],
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    case = site_case(
        "llama", tmp_path / "dense", {f"blocks.0.{site}": FLAP}, dtype=dtype
    )
    model, config, notes = export_of(case, tmp_path / "export", PLAIN)
    assert torch.equal(case.logits(model), case.logits())
    assert config[setting] is True
    assert notes[0] == f"{setting}: {2 * len(covered)} layers get a bias"
    found = {n: p for n, p in model.named_parameters() if n.endswith(".bias")}
    assert {name.split(".")[-2] for name in found} == set(covered)
    filled = [name for name, bias in found.items() if bias.any()]
    assert [name.split(".")[2:] for name in filled] == [
        ["0", "mlp" if site == "mlp" else "self_attn", covered[-1], "bias"]
    ]
    # Each layer of the setting has one, in every block: that is what it costs.
    dense = TransformersFolder.written_bytes(PLAIN, tmp_path / "dense")
    size = PLAIN.written_bytes(tmp_path / "export")
    numbers = sum(bias.numel() for bias in found.values())
    assert 0 < size - dense - numbers * dtype.itemsize < 120 * len(found)


def test_cut_models_keep_them(tmp_path: Path) -> None:
    policy = {f"blocks.{i}.{s}": FLAP for i in (0, 1) for s in ("mlp", "attention")}
    case = site_case("llama", tmp_path / "dense", policy)
    model, config, notes = export_of(case, tmp_path / "export", PLAIN)
    torch.testing.assert_close(case.logits(model), case.logits(), rtol=1e-4, atol=1e-5)
    assert config["intermediate_size"] == 24 and config["num_attention_heads"] == 2
    assert config["mlp_bias"] is True and config["attention_bias"] is True
    assert model.model.layers[0].mlp.gate_proj.bias.shape == (24,)
    assert model.model.layers[1].self_attn.o_proj.bias.any()
    assert len(notes) == 3
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(case.logits(again), case.logits(model))


@pytest.mark.parametrize(
    ("kind", "sites", "width"),
    [
        ("gpt2", ("mlp",), "n_inner"),
        ("opt", ("mlp",), "ffn_dim"),
        ("bert", ("mlp",), "intermediate_size"),
        ("qwen2", (), None),
    ],
)
def test_biases_that_are_there_take_them(
    kind: str, sites: tuple[str, ...], width: str | None, tmp_path: Path
) -> None:
    """Rows that are cut lose their biases, and what these gave on average stays."""
    policy = {f"blocks.{i}.{site}": FLAP for i in (0, 1) for site in sites}
    if not sites:
        policy = {f"blocks.{i}.attention": BARE for i in (0, 1)}
    case = site_case(kind, tmp_path / "dense", policy)
    model, config, notes = export_of(case, tmp_path / "export", PLAIN)
    torch.testing.assert_close(case.logits(model), case.logits(), rtol=1e-4, atol=1e-5)
    assert len(notes) == 1 and notes[0].startswith("cut ")
    units = next(s.units for s in case.job.storages.values() if s.units)
    if width:
        assert config[width] == units
    else:
        assert model.model.layers[0].self_attn.q_proj.bias.shape == (16,)


@pytest.mark.parametrize(
    ("kind", "site", "role"),
    [
        ("mistral", "mlp", "down_proj"),
        ("qwen2", "attention", "o_proj"),
        ("gemma2", "mlp", "down_proj"),
    ],
)
def test_what_has_no_place_for_them_refuses(
    kind: str, site: str, role: str, tmp_path: Path
) -> None:
    case = site_case(kind, tmp_path / "dense", {f"blocks.0.{site}": FLAP})
    exporter = PLAIN.for_model(case.dense, case.job.inventory)
    reasons = [exporter.refuses(la, s) for la, s in case.job.storages.items()]
    told = [reason for reason in reasons if reason]
    assert len(told) == 1 and f"has no place for a bias of {role}" in told[0]
    (tmp_path / "export").mkdir()
    with pytest.raises(ExportError, match=f"cannot hold .*{role}: .* no place"):
        exporter.write(tmp_path / "export", case.job)
    model, _, _ = export_of(case, tmp_path / "packed", PACKED)
    assert torch.equal(case.logits(model), case.logits())
