"""A plain checkpoint leaves out what a structured policy has removed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from autoprune_plugins.transformers_folder import TransformersFolder
from tiny_cuts import cut_case
from tiny_exports import Case
from tiny_runs import config_of, write_text

from autoprune.deliver import export_policy
from autoprune.errors import ExportError
from autoprune.exporting.cutting import Cutter
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Policy
from autoprune.searching.plan import Plan

PLAIN = TransformersFolder()
HALF = "channels(keep=0.5, score=magnitude)"
MORE = "channels(keep=0.75, score=magnitude)"
HEAD = "heads(keep=0.5, score=magnitude)"
RTN = " + rtn(bits=8, group=8)"


def export_of(case: Case, folder: Path) -> tuple[Any, dict[str, Any], list[str]]:
    """Write, check size and logits; give the model, its configuration and the notes."""
    folder.mkdir()
    exporter = PLAIN.for_model(case.dense, case.job.inventory)
    exporter.write(folder, case.job)
    predicted = exporter.size_bytes(case.job.storages, case.untouched)
    assert exporter.written_bytes(folder) == predicted
    factory = getattr(transformers, case.job.auto_class)
    model = factory.from_pretrained(folder)
    torch.testing.assert_close(case.logits(model), case.logits(), rtol=1e-4, atol=1e-5)
    assert type(model) is type(case.dense)
    prices = [exporter.layer_bytes(la, s) for la, s in case.job.storages.items()]
    bound = exporter.size_bytes({}, case.untouched) + sum(prices)
    assert predicted <= bound
    config = json.loads((folder / "config.json").read_text())
    return model, config, exporter.notes(case.job.storages)


def dense_bytes(folder: Path) -> int:
    return PLAIN.written_bytes(folder)


def everywhere(name: str, action: str, blocks: int = 2) -> dict[str, str]:
    return {f"blocks.{block}.{name}": action for block in range(blocks)}


@pytest.mark.parametrize(
    ("kind", "width"),
    [("llama", "intermediate_size"), ("gpt2", "n_inner"), ("opt", "ffn_dim")],
)
def test_channels_are_cut_with_their_biases(
    kind: str, width: str, tmp_path: Path
) -> None:
    case = cut_case(kind, tmp_path / "dense", everywhere("mlp", HALF))
    model, config, notes = export_of(case, tmp_path / "export")
    units = next(s.units for s in case.job.storages.values() if s.units)
    assert config[width] == units
    assert dense_bytes(tmp_path / "export") < dense_bytes(tmp_path / "dense")
    assert notes == [f"cut channels: {units} of {2 * units} stay in every block"]
    ids = torch.arange(3, 9)[None]
    assert model.generate(ids, min_new_tokens=2, max_new_tokens=2).shape == (1, 8)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "gemma2", "mixtral", "granite"]
)
def test_heads_are_cut_in_groups(kind: str, tmp_path: Path) -> None:
    case = cut_case(kind, tmp_path / "dense", everywhere("attention", HEAD))
    model, config, notes = export_of(case, tmp_path / "export")
    assert config["num_attention_heads"] == 2
    assert config["num_key_value_heads"] == 1
    assert config["head_dim"] == 8
    block = model.model.layers[1].self_attn
    assert block.q_proj.weight.shape == (16, 32)
    assert block.k_proj.weight.shape == (8, 32)
    assert block.o_proj.weight.shape == (32, 16)
    if kind == "qwen2":
        assert block.v_proj.bias.shape == (8,)
    assert notes == ["cut heads: 1 of 2 stay in every block"]


@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        ("llama", 0),
        ("qwen2", 1),
        ("llama", 2),
        ("smollm3", 0),
        ("olmo2", 0),
        ("mixtral", 0),
    ],
)
def test_a_dropped_block_is_left_out(kind: str, gone: int, tmp_path: Path) -> None:
    policy = {f"blocks.{gone}.block": "drop"}
    case = cut_case(kind, tmp_path / "dense", policy, num_hidden_layers=3)
    model, config, notes = export_of(case, tmp_path / "export")
    assert config["num_hidden_layers"] == 2
    for name in ("layer_types", "no_rope_layers"):
        assert len(config.get(name) or "xx") == 2
    before = case.dense.state_dict()
    stays = [block for block in range(3) if block != gone]
    for name, tensor in model.state_dict().items():
        for new, old in reversed(list(enumerate(stays))):
            name = name.replace(f"layers.{new}.", f"layers.{old}.")
            if f"layers.{old}." in name:
                break
        assert torch.equal(tensor, before[name]), name
    assert notes == [f"left out blocks {gone} of 3, counted from 0"]


def test_kinds_of_blocks_stay_with_their_blocks(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    changes = {"num_hidden_layers": 3, "layer_types": kinds}
    policy = {"blocks.0.block": "drop"}
    case = cut_case("gemma2", tmp_path / "dense", policy, **changes)
    config = export_of(case, tmp_path / "export")[1]
    assert config["layer_types"] == kinds[1:]


def test_all_at_once_with_codes_behind(tmp_path: Path) -> None:
    policy = {
        "blocks.0.block": "drop",
        "blocks.1.mlp": HALF + RTN,
        "blocks.2.mlp": HALF,
        "blocks.1.attention": HEAD,
        "blocks.2.attention": HEAD + RTN,
    }
    case = cut_case("qwen2", tmp_path / "dense", policy, num_hidden_layers=3)
    _, config, notes = export_of(case, tmp_path / "export")
    wanted = {
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    assert {name: config[name] for name in wanted} == wanted
    assert len(notes) == 3


def test_widths_that_differ_stay_zeros(tmp_path: Path) -> None:
    policy = {
        "blocks.0.mlp": HALF,
        "blocks.1.mlp": MORE,
        "blocks.1.attention": HEAD,
    }
    case = cut_case("llama", tmp_path / "dense", policy)
    _, config, notes = export_of(case, tmp_path / "export")
    assert config["intermediate_size"] == 48 and config["num_attention_heads"] == 4
    assert dense_bytes(tmp_path / "export") == dense_bytes(tmp_path / "dense")
    assert notes == [
        "channels stay as zeros of full size: blocks keep 24 to 36 of 48, not equally "
        "many",
        "heads stay as zeros of full size: blocks keep 1 to 2 of 2, not equally many",
    ]


def test_half_a_block_stays_zeros_as_wide_as_the_others(tmp_path: Path) -> None:
    policy = {"blocks.0.mlp": "drop", "blocks.1.mlp": HALF}
    case = cut_case("qwen2", tmp_path / "dense", policy)
    model, config, notes = export_of(case, tmp_path / "export")
    assert config["intermediate_size"] == 24 and config["num_hidden_layers"] == 2
    assert not model.model.layers[0].mlp.down_proj.weight.any()
    assert notes[0].startswith("dropped blocks.0.mlp alone: a block needs both")


def test_both_halves_dropped_are_a_block(tmp_path: Path) -> None:
    policy = {"blocks.0.mlp": "drop", "blocks.0.attention": "drop"}
    config = export_of(cut_case("llama", tmp_path / "d", policy), tmp_path / "e")[1]
    assert config["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("kind", "policy", "changes", "told"),
    [
        ("gpt2", {"blocks.0.block": "drop"}, {}, "blocks 0 stay .* adds a bias"),
        ("llama", everywhere("block", "drop"), {}, "no block would be left"),
        (
            "opt",
            everywhere("attention", HEAD),
            {},
            "heads stay .* another shape of .*k_proj.bias",
        ),
        ("gpt_oss", everywhere("attention", HEAD), {}, "want another shape of .*sinks"),
        (
            "llama",
            everywhere("attention", "heads(keep=0.75, score=magnitude)"),
            {"num_key_value_heads": 4},
            "heads stay .* not a multiple of",
        ),
    ],
    ids=["bias", "all", "opt", "sinks", "indivisible"],
)
def test_what_the_class_cannot_hold_stays_zeros(
    kind: str,
    policy: dict[str, str],
    changes: dict[str, Any],
    told: str,
    tmp_path: Path,
) -> None:
    case = cut_case(kind, tmp_path / "dense", policy, **changes)
    _, _, notes = export_of(case, tmp_path / "export")
    assert dense_bytes(tmp_path / "export") == dense_bytes(tmp_path / "dense")
    assert len(notes) == 1 and re.search(told, notes[0]), notes


def test_layers_of_a_site_that_disagree_are_an_error(tmp_path: Path) -> None:
    case = cut_case("llama", tmp_path / "dense", everywhere("mlp", HALF))
    cutter = Cutter(case.dense, case.job.inventory)
    remains, _ = cutter.decide(case.job.storages)
    kept = {layer: torch.arange(24) for layer in case.job.storages}
    down = next(la for la in kept if la.name.endswith("1.mlp.down_proj"))
    kept[down] = torch.arange(1, 25)
    with pytest.raises(ExportError, match=r"keeps 24 units, but 24 were declared"):
        cutter.cut(case.model, remains, kept)


def test_the_dense_model_is_left_as_it_was(tmp_path: Path) -> None:
    case = cut_case("llama", tmp_path / "dense", {})
    before = {name: t.clone() for name, t in case.dense.state_dict().items()}
    PLAIN.for_model(case.dense, case.job.inventory)
    after = case.dense.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m._forward_hooks for m in case.dense.modules())


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_no_removal_no_notes(kind: str, tmp_path: Path) -> None:
    case = cut_case(kind, tmp_path / "dense", {})
    assert export_of(case, tmp_path / "export")[2] == []


@pytest.mark.slow
@pytest.mark.ci
def test_a_fresh_process_agrees_and_the_card_tells(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path),
        space=[
            {"sites": "blocks.0.block", "actions": ["drop"]},
            {"sites": "blocks.1.mlp", "actions": [HALF + RTN]},
        ],
        objective={},
        export="transformers",
    )
    plan = Plan.make(config, load_plugins(), cache=tmp_path)
    names = [site.name for site in plan.problem.space.sites]
    removed = {"blocks.0.block": "drop", "blocks.1.mlp": HALF + RTN}
    texts = dict.fromkeys(names, "dense") | removed
    policy = Policy({name: Action.parse(text) for name, text in texts.items()})
    plan.bank.make(plan.pairs)
    report = export_policy(
        plan.bench,
        plan.bank,
        policy,
        place=tmp_path / "export",
        target="transformers",
        record={},
        plugins=[],
        force=False,
    )
    assert report.size_bytes == report.metrics["size_bytes"]
    dense = plan.bench.dense_metrics("report")
    assert report.size_bytes < dense["size_bytes"]
    left, cut = report.notes
    assert left == "left out blocks 0 of 2, counted from 0"
    assert re.fullmatch(r"cut channels: (\d+) of \d+ stay in every block", cut)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "In the target `transformers`: left out blocks 0 of 2" in card
