"""The target ``packed``: what is stored, its size, and the model that comes back."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.packed import WEIGHTS, Packed
from safetensors import safe_open
from tiny_exports import FORMS, Case, case_of, tiny_case
from tiny_models import CONFIGS, tiny
from transformers import AutoModelForCausalLM

from autoprune.compression.variant import Variant
from autoprune.errors import ExportError
from autoprune.exporting.marker import MARKER
from autoprune.models.layers import read_weight

PACKED = Packed()


def written(case: Case, folder: Path) -> Path:
    folder.mkdir()
    PACKED.write(folder, case.job)
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export of a tiny Llama with every kind of variant; a test may damage it."""
    return written(tiny_case("llama", tmp_path / "dense"), tmp_path / "export")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_bit_for_bit(form: str, tmp_path: Path) -> None:
    case = tiny_case("llama", tmp_path / "dense", [form])
    folder = written(case, tmp_path / "export")
    assert torch.equal(case.logits(PACKED.load(folder)), case.logits())
    predicted = PACKED.size_bytes(case.job.storages, case.untouched)
    assert (folder / WEIGHTS).stat().st_size == predicted


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_comes_back(kind: str, tmp_path: Path) -> None:
    case = tiny_case(kind, tmp_path / "dense")
    folder = written(case, tmp_path / "export")
    loaded = PACKED.load(folder)
    assert type(loaded) is type(case.model)
    assert torch.equal(case.logits(loaded), case.logits())
    predicted = PACKED.size_bytes(case.job.storages, case.untouched)
    assert PACKED.written_bytes(folder) == predicted


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "mixtral", "gpt2"])
def test_half_precision_and_what_no_file_stores(kind: str, tmp_path: Path) -> None:
    tiny(kind).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    case = case_of(tmp_path / "bf16", "AutoModelForCausalLM", list(FORMS))
    loaded = PACKED.load(written(case, tmp_path / "export"))
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(case.logits(loaded), case.logits())
    found, wanted = dict(loaded.named_buffers()), dict(case.model.named_buffers())
    assert found.keys() == wanted.keys()
    for name, buffer in wanted.items():  # rotary frequencies, in float32
        assert found[name].dtype == buffer.dtype
        assert torch.equal(found[name], buffer), name


def test_the_file_holds_the_parts_and_nothing_twice(tmp_path: Path) -> None:
    case = tiny_case("qwen2", tmp_path / "dense")  # tied
    folder = written(case, tmp_path / "export")
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = set(file.keys())
        for layer, storage in case.job.storages.items():
            for part, about in storage.parts.items():
                tensor = file.get_tensor(f"{layer.name}.{part}")
                assert str(tensor.dtype) == f"torch.{about.dtype}"
                assert tuple(tensor.shape) == about.shape
                names.remove(f"{layer.name}.{part}")
    assert names == case.untouched.keys()
    assert not any("lm_head" in name for name in names)


def test_a_loaded_model_is_ready_to_run(tmp_path: Path) -> None:
    case = tiny_case("qwen2", tmp_path / "dense")
    state = torch.random.get_rng_state()
    loaded: Any = PACKED.load(written(case, tmp_path / "export"))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn
    ids = loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] <= 5


def test_settings_for_generation_are_read(export: Path) -> None:
    settings = json.dumps({"eos_token_id": 7, "temperature": 0.2, "top_p": 0.9})
    (export / "generation_config.json").write_text(settings)
    loaded: Any = PACKED.load(export)
    assert loaded.generation_config.eos_token_id == 7
    assert loaded.generation_config.temperature == 0.2


def test_the_marker_tells_people_what_was_done(export: Path) -> None:
    marker = json.loads((export / MARKER).read_text())
    layer = marker["layers"]["model.layers.0.self_attn.q_proj"]
    assert layer["action"] == "bitmap(sparsity=0.37)"
    assert layer["mask"] == "bitmap"
    assert (marker["format"], marker["target"]) == (2, "packed")
    assert marker["auto_class"] == "AutoModelForCausalLM"
    assert marker["dtype"] == "float32"


def test_plain_transformers_does_not_load_it_with_random_weights(export: Path) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(export)


def test_a_variant_other_than_declared_is_refused(tmp_path: Path) -> None:
    case = tiny_case("llama", tmp_path / "dense")

    def other(layer: Any) -> Variant:
        return Variant.dense(read_weight(case.dense, layer))

    job = replace(case.job, variant=other)
    (tmp_path / "export").mkdir()
    with pytest.raises(ExportError, match=r"_proj' stores .* was declared"):
        PACKED.write(tmp_path / "export", job)


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def flip(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def no_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"nothing like it")
    sha256 = hashlib.sha256(b"nothing like it").hexdigest()
    change_marker(folder, files={WEIGHTS: sha256})


def change_marker(folder: Path, **changes: Any) -> None:
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**marker, **changes}))


def change_layer(folder: Path, **changes: Any) -> None:
    layers = json.loads((folder / MARKER).read_text())["layers"]
    layers["model.layers.0.self_attn.o_proj"].update(changes)
    change_marker(folder, layers=layers)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_layer(folder: Path) -> None:
    layers = json.loads((folder / MARKER).read_text())["layers"]
    del layers["model.layers.1.mlp.down_proj"]
    change_marker(folder, layers=layers)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), rf"cannot read .*{WEIGHTS}: No such file"),
        (truncate, rf"{WEIGHTS} is damaged: its \d+ bytes have SHA-256 [0-9a-f]{{64}}"),
        (flip, rf"{WEIGHTS} is damaged: its .* expected [0-9a-f]{{64}}"),
        (no_safetensors, rf"{WEIGHTS} is damaged: .*[Hh]eader"),
        (lambda f: (f / MARKER).unlink(), rf"cannot read .*{MARKER}: No such file"),
        (lambda f: (f / MARKER).write_text("{"), rf"{MARKER} is damaged: Expecting"),
        (lambda f: (f / MARKER).write_text("[1]"), rf"{MARKER} .* it holds \[1\]"),
        (lambda f: change_marker(f, format=3), "has format 3, .* reads up to 2"),
        (lambda f: change_marker(f, target="gguf"), "target 'gguf', not 'packed'"),
        (lambda f: change_marker(f, layers=None), "'layers' is None, expected dict"),
        (lambda f: change_marker(f, dtype="bfloat61"), "bfloat61"),
        (lambda f: change_marker(f, auto_class="AutoModelForDogs"), "AutoModelForDogs"),
        (lambda f: change_layer(f, dtype="int3"), r"o_proj.values' is .*'int3'"),
        (lambda f: change_layer(f, dtype="int33"), r"o_proj' stores .*'int33'"),
        (lambda f: change_config(f, intermediate_size=56), r"shape \(56, 32\)"),
        (lambda f: change_layer(f, colour="red"), r"o_proj' stores .*'colour'"),
        (lambda f: change_layer(f, kept=3), r"'model.*o_proj.\w+' is .* expected .*3"),
        (drop_layer, r"do not fit config.json: 1 tensors are missing, .*down_proj"),
        (lambda f: (f / "config.json").unlink(), "cannot make the model of .*config"),
        (lambda f: change_config(f, num_hidden_layers=1), "are unexpected, first"),
        (lambda f: change_config(f, vocab_size=60), "are mismatched, first"),
        (lambda f: change_config(f, model_type="yolo3"), "yolo3"),
    ],
)
def test_damage_is_told(
    damage: Callable[[Path], object], message: str, export: Path
) -> None:
    damage(export)
    with pytest.raises(ExportError, match=message):
        PACKED.load(export)
