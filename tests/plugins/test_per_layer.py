"""Every block is cut to what it keeps by itself, and a class of our own runs it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.per_layer_folder import AUTO_MAP, CODE, UNEVEN, PerLayerFolder
from tiny_cuts import cut_case
from tiny_exports import Case, tiny_case
from tiny_models import CONFIGS
from tiny_sites import site_case
from transformers import AutoModelForCausalLM

from autoprune.compression.variant import Variant
from autoprune.errors import ExportError
from autoprune.exporting.digests import digest
from autoprune.exporting.exporter import EXACT
from autoprune.exporting.marker import MARKER
from autoprune.models.checkpoints import Checkpoint, load_tokenizer
from autoprune.models.layers import read_weight
from autoprune.policy import Layer

TARGET = PerLayerFolder()
HALF = "channels(keep=0.5, score=magnitude)"
MORE = "channels(keep=0.75, score=magnitude)"
HEAD = "heads(keep=0.5, score=magnitude)"
RTN = " + rtn(bits=8, group=8)"
MIXED = {
    "blocks.0.mlp": HALF,
    "blocks.0.attention": HEAD,
    "blocks.1.mlp": MORE + RTN,
    "blocks.2.block": "drop",
    "blocks.3.attention": "drop",
    "blocks.4.mlp": "drop",
    "blocks.4.attention": HEAD,
}
IDS = torch.arange(3, 13)[None]


def exported(case: Case, folder: Path) -> tuple[PerLayerFolder, Any]:
    """Write, check sizes, digests and logits; give the exporter and the model."""
    folder.mkdir()
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    storages = case.job.storages
    assert not any(exporter.refuses(la, s) for la, s in storages.items())
    assert exporter.refuses_policy(storages, case.job.inventory) is None
    digests = exporter.write(folder, case.job)
    predicted = exporter.size_bytes(storages, case.untouched)
    assert exporter.written_bytes(folder) == predicted
    prices = [exporter.layer_bytes(la, s) for la, s in storages.items()]
    assert predicted <= exporter.size_bytes({}, case.untouched) + sum(prices)
    model = exporter.load(folder)
    torch.testing.assert_close(case.logits(model), case.logits(), rtol=1e-4, atol=1e-5)
    found = {name: digest(model.get_submodule(name).weight) for name in digests}
    assert found == digests
    return exporter, model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    folder = tmp_path_factory.mktemp("mixed")
    case = cut_case("llama", folder / "dense", MIXED, num_hidden_layers=5)
    exported(case, folder / "export")
    return case, folder / "export"


@pytest.fixture
def export(mixed: tuple[Case, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed[1], tmp_path / "export"))


def test_each_block_is_as_wide_as_what_it_keeps(mixed: tuple[Case, Path]) -> None:
    model = TARGET.load(mixed[1])
    first, second, third, fourth = model.model.layers
    assert first.mlp.down_proj.weight.shape == (32, 24)
    assert first.self_attn.q_proj.weight.shape == (16, 32)
    assert first.self_attn.k_proj.weight.shape == (8, 32)
    assert second.mlp.gate_proj.weight.shape == (36, 32)
    assert second.self_attn.o_proj.weight.shape == (32, 32)
    assert [name for name, _ in third.named_parameters()] == [
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "post_attention_layernorm.weight",
    ]
    assert not any(
        "mlp" in name or "post" in name for name, _ in fourth.named_buffers()
    )
    assert fourth.self_attn.v_proj.weight.shape == (8, 32)


def test_what_is_left_out_is_told(mixed: tuple[Case, Path]) -> None:
    case = mixed[0]
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    assert exporter.notes(case.job.storages) == [
        "left out blocks 2 of 5, counted from 0",
        "left out the attention of blocks 3",
        "cut groups of heads: 1 to 2 of 2 stay in a block",
        "left out the mlp of blocks 4",
        "cut channels: 24 to 48 of 48 stay in a block",
        "3 layers are quantized: their values stay at full size",
        "loading runs modeling_per_layer.py of the folder: pass trust_remote_code=True",
    ]
    assert exporter.bounds(case.job.storages) == UNEVEN


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("policy", [MIXED, {"blocks.0.attention": "drop"}])
def test_a_cache_changes_no_token(
    policy: dict[str, str], cache: str | None, tmp_path: Path
) -> None:
    case = cut_case("llama", tmp_path / "dense", policy, num_hidden_layers=5)
    model = exported(case, tmp_path / "export")[1]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    without = model.generate(IDS, use_cache=False, **settings)
    kept = model.generate(IDS, cache_implementation=cache, **settings)
    expected = case.model.generate(IDS, use_cache=False, **settings)
    assert torch.equal(kept, without)
    assert torch.equal(without, expected)


def test_it_is_an_ordinary_model_once_it_is_trusted(
    export: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    assert type(model).is_backend_compatible()  # what vLLM asks of a class
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE).read_bytes() == (export / CODE).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    )
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    model.set_attn_implementation("eager")  # reaches every block
    eager = model(IDS, output_attentions=True)
    torch.testing.assert_close(eager.logits, again(IDS).logits, rtol=1e-4, atol=1e-5)
    assert len([weights for weights in eager.attentions if weights is not None]) == 3


def test_nothing_loads_it_without_trust(export: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(export, trust_remote_code=False)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_dense_model_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    case = tiny_case(kind, tmp_path / "dense")  # every form of weights
    exporter, model = exported(case, tmp_path / "export")
    assert torch.equal(case.logits(model), case.logits())
    assert exporter.bounds(case.job.storages) == EXACT
    notes = exporter.notes(case.job.storages)
    assert notes[0].startswith("all blocks are alike: the target transformers")


def test_a_sliding_window_stays(tmp_path: Path) -> None:
    policy = {"blocks.0.attention": "drop", "blocks.1.mlp": HALF}
    case = cut_case("mistral", tmp_path / "dense", policy, num_hidden_layers=3)
    _, model = exported(case, tmp_path / "export")
    assert model.config.sliding_window == 4
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    without = model.generate(IDS, use_cache=False, **settings)
    assert torch.equal(model.generate(IDS, **settings), without)


def test_settings_of_positions_and_ties_are_carried_on(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    changes = {"rope_parameters": rope, "tie_word_embeddings": True}
    policy = {"blocks.0.mlp": HALF}
    case = cut_case("llama", tmp_path / "dense", policy, **changes)
    _, model = exported(case, tmp_path / "export")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biases_go_where_they_are_needed(dtype: torch.dtype, tmp_path: Path) -> None:
    policy = {"blocks.1.mlp": "flap(keep=0.5)", "blocks.0.attention": "flap(keep=0.5)"}
    case = site_case("llama", tmp_path / "dense", policy, dtype=dtype)
    (tmp_path / "export").mkdir()
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    exporter.write(tmp_path / "export", case.job)
    predicted = exporter.size_bytes(case.job.storages, case.untouched)
    assert exporter.written_bytes(tmp_path / "export") == predicted
    prices = [exporter.layer_bytes(la, s) for la, s in case.job.storages.items()]
    assert predicted <= exporter.size_bytes({}, case.untouched) + sum(prices)
    model: Any = exporter.load(tmp_path / "export")
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert biases == [
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.1.mlp.down_proj.bias",
    ]
    exact = dtype == torch.float32
    close = {"rtol": 1e-4, "atol": 1e-5} if exact else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(case.logits(model), case.logits(), **close)


def test_biases_of_the_dense_model_are_cut_and_kept(tmp_path: Path) -> None:
    policy = {
        "blocks.0.attention": HEAD,
        "blocks.0.mlp": HALF,
        "blocks.1.attention": "drop",  # its bias is still added
        "blocks.1.mlp": MORE,
    }
    changes = {"attention_bias": True, "mlp_bias": True}
    case = cut_case("llama", tmp_path / "dense", policy, **changes)
    exporter, model = exported(case, tmp_path / "export")
    assert model.model.layers[0].self_attn.q_proj.bias.shape == (16,)
    assert model.model.layers[1].self_attn.q_proj.weight.shape == (32, 32)
    assert "left out" not in " ".join(exporter.notes(case.job.storages))


def test_an_order_of_channels_is_folded_behind_the_cut(tmp_path: Path) -> None:
    action = "ria(pattern=2:4, permute=true)"
    policy = {"blocks.0.down": action, "blocks.1.down": action}
    case = site_case("llama", tmp_path / "dense", policy)
    _, model = exported(case, tmp_path / "export")
    assert [s.permuted for s in case.job.storages.values()].count(True) == 2
    for block in model.model.layers:
        groups = (block.mlp.down_proj.weight != 0).reshape(-1, 4).sum(1)
        assert int(groups.max()) <= 2


def test_an_order_and_a_cut_go_together(tmp_path: Path) -> None:
    case = cut_case("llama", tmp_path / "dense", {"blocks.0.mlp": HALF})
    down = case.job.inventory.layer("model.layers.0.mlp.down_proj")
    order = torch.arange(47, -1, -1)
    variant = case.job.variant(down)
    permuted = replace(
        variant, storage=replace(variant.storage, permuted=True), order=order
    )
    storages = {**case.job.storages, down: permuted.storage}
    job = replace(
        case.job,
        storages=storages,
        variant=lambda la: permuted if la == down else case.job.variant(la),
    )
    _, model = exported(replace(case, job=job), tmp_path / "export")
    dense = read_weight(case.dense, down)
    columns = variant.mask.any(0).nonzero().flatten().flip(0)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, dense[:, columns])


def test_units_that_a_later_step_empties_still_count(tmp_path: Path) -> None:
    case = cut_case("llama", tmp_path / "dense", {"blocks.0.mlp": HALF})

    def emptied(layer: Layer) -> Variant:
        variant = case.job.variant(layer)
        if layer.block != 0 or layer.cut is None or layer.cut.kind != "channels":
            return variant
        rows = layer.cut.axis == "rows"
        mask = variant.mask.clone()
        lines = mask if rows else mask.T
        lines[lines.any(1).nonzero()[0]] = False
        return replace(variant, mask=mask, values=variant.values * mask)

    job = replace(case.job, variant=emptied)
    (tmp_path / "export").mkdir()
    exporter = TARGET.for_model(case.dense, job.inventory)
    exporter.write(tmp_path / "export", job)
    model: Any = exporter.load(tmp_path / "export")
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.shape == (32, 24)
    assert (down == 0).all(0).sum() == 1


def test_layers_that_keep_other_units_are_refused(tmp_path: Path) -> None:
    case = cut_case("llama", tmp_path / "dense", {"blocks.0.mlp": HALF})

    def shifted(layer: Layer) -> Variant:
        variant = case.job.variant(layer)
        if layer.role != "up_proj" or layer.block != 0:
            return variant
        return replace(variant, mask=variant.mask.roll(1, 0))

    (tmp_path / "export").mkdir()
    job = replace(case.job, variant=shifted)
    with pytest.raises(ExportError, match=r"of blocks.0.mlp keep 3?\d+ units .* 24 "):
        TARGET.write(tmp_path / "export", job)


def test_several_weight_files(tmp_path: Path) -> None:
    case = cut_case("llama", tmp_path / "dense", MIXED, num_hidden_layers=5)
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    exporter.shard_bytes = 20_000
    (tmp_path / "export").mkdir()
    exporter.write(tmp_path / "export", case.job)
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 3
    predicted = exporter.size_bytes(case.job.storages, case.untouched)
    assert exporter.written_bytes(tmp_path / "export") == predicted
    logits = case.logits(exporter.load(tmp_path / "export"))
    torch.testing.assert_close(logits, case.logits(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"llama", "mistral", "bert"}))
def test_other_families_are_refused_and_still_priced(kind: str, tmp_path: Path) -> None:
    case = tiny_case(kind, tmp_path / "dense", ["dense"])
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    layer, storage = next(iter(case.job.storages.items()))
    wanted = "types llama and mistral, not a .*target transformers writes any model"
    assert exporter.refuses(layer, storage) is not None
    with pytest.raises(ExportError, match=wanted):
        exporter.write(tmp_path, case.job)
    assert exporter.refuses_policy(case.job.storages, case.job.inventory)
    assert exporter.size_bytes(case.job.storages, case.untouched) > sum(
        one.nbytes for one in case.job.storages.values()
    )
    assert exporter.notes(case.job.storages)


def test_a_model_without_any_attention_is_refused(tmp_path: Path) -> None:
    policy = {f"blocks.{block}.attention": "drop" for block in range(2)}
    case = cut_case("llama", tmp_path / "dense", policy)
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    reason = exporter.refuses_policy(case.job.storages, case.job.inventory)
    assert reason is not None and "no block would keep an attention" in reason
    with pytest.raises(ExportError, match="no block would keep an attention"):
        exporter.write(tmp_path, case.job)


def test_what_has_to_be_rotated_or_permuted_elsewhere_is_refused(
    mixed: tuple[Case, Path],
) -> None:
    case = mixed[0]
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    layer = next(la for la in case.job.storages if la.role == "o_proj")
    storage = case.job.storages[layer]
    rotated = exporter.refuses(layer, replace(storage, hidden=16))
    assert (
        rotated == "the target per-layer does not rotate; the target transformers does"
    )
    permuted = exporter.refuses(layer, replace(storage, permuted=True))
    assert permuted is not None and "belong to heads" in permuted


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_code(folder: Path) -> None:
    """A change that the marker would vouch for."""
    code = (folder / CODE).read_bytes() + b"\nraise SystemExit\n"
    (folder / CODE).write_bytes(code)
    marker = json.loads((folder / MARKER).read_text())
    marker["code"] = {CODE: hashlib.sha256(code).hexdigest()}
    (folder / MARKER).write_text(json.dumps(marker))


OTHER_MAP = {**AUTO_MAP, "AutoConfig": "someone/else--evil.Config"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            change_code,
            rf"{CODE} is not .* SHA-256 is [0-9a-f]{{64}}, expected [0-9a-f]",
        ),
        (lambda f: (f / CODE).unlink(), rf"is damaged: .*{CODE}"),
        (lambda f: change_config(f, auto_map=OTHER_MAP), "from .*evil.Config.*not run"),
        (lambda f: (f / "config.json").write_text("{"), "is damaged: Expecting"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot load .*model.safetens"),
        (lambda f: change_config(f, per_layer_config={}), "shape.*config.json asks"),
        (lambda f: change_config(f, num_hidden_layers=4, vocab_size=60), r"\[60, 32\]"),
        (lambda f: (f / MARKER).unlink(), rf"cannot read .*{MARKER}"),
    ],
)
def test_damage_and_other_code_are_told(
    damage: Callable[[Path], object], message: str, export: Path
) -> None:
    damage(export)
    with pytest.raises(ExportError, match=message):
        TARGET.load(export)


def test_the_marker_names_the_code(export: Path) -> None:
    code = (export / CODE).read_bytes()
    marker = json.loads((export / MARKER).read_text())
    assert marker["code"] == {CODE: hashlib.sha256(code).hexdigest()}
    assert b"SPDX-License-Identifier: Apache-2.0" in code.splitlines()[0]


def test_a_tokenizer_loads_without_trust(export: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(export)
    checkpoint = Checkpoint(str(export), export, "")
    found = load_tokenizer(checkpoint)("a b").input_ids
    assert found == tiny_tokenizer("a b").input_ids
