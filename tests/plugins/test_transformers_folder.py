"""The target ``transformers``: plain transformers opens it, and its size is known."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from autoprune_plugins.transformers_folder import TransformersFolder
from tiny_exports import FORMS, Case, case_of, tiny_case
from tiny_models import CONFIGS, tiny
from transformers import AutoModelForCausalLM

from autoprune.compression.storage import Storage
from autoprune.errors import ExportError
from autoprune.exporting.exporter import Exporter
from autoprune.exporting.marker import MARKER

PLAIN = TransformersFolder()


def fitted(case: Case) -> Exporter:
    return PLAIN.for_model(case.dense, case.job.inventory)


def written(case: Case, folder: Path) -> Path:
    folder.mkdir()
    PLAIN.write(folder, case.job)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_plain_transformers_reads_every_architecture(kind: str, tmp_path: Path) -> None:
    case = tiny_case(kind, tmp_path / "dense")
    folder = written(case, tmp_path / "export")
    factory = getattr(transformers, case.job.auto_class)
    assert torch.equal(case.logits(factory.from_pretrained(folder)), case.logits())
    assert torch.equal(case.logits(PLAIN.load(folder)), case.logits())
    predicted = fitted(case).size_bytes(case.job.storages, case.untouched)
    assert (folder / "model.safetensors").stat().st_size == predicted


def test_half_precision_is_kept(tmp_path: Path) -> None:
    tiny("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    case = case_of(tmp_path / "bf16", "AutoModelForCausalLM", list(FORMS))
    folder = written(case, tmp_path / "export")
    assert PLAIN.load(folder).dtype == torch.bfloat16
    assert torch.equal(case.logits(PLAIN.load(folder)), case.logits())
    predicted = fitted(case).size_bytes(case.job.storages, case.untouched)
    assert PLAIN.written_bytes(folder) == predicted


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt_oss"])
def test_no_policy_saves_a_byte(kind: str, tmp_path: Path) -> None:
    case = tiny_case(kind, tmp_path / "dense")
    exporter, storages = fitted(case), case.job.storages
    dense = {layer: Storage.dense(layer) for layer in storages}
    size = exporter.size_bytes(dense, case.untouched)
    assert exporter.size_bytes(storages, case.untouched) == size
    prices = sum(exporter.layer_bytes(la, s) for la, s in storages.items())
    assert exporter.size_bytes({}, case.untouched) + prices == size


def test_without_a_model_the_names_are_those_in_memory(tmp_path: Path) -> None:
    case = tiny_case("llama", tmp_path / "dense")
    folder = written(case, tmp_path / "export")
    predicted = PLAIN.size_bytes(case.job.storages, case.untouched)
    assert PLAIN.written_bytes(folder) == predicted
    prices = sum(PLAIN.layer_bytes(la, s) for la, s in case.job.storages.items())
    assert PLAIN.size_bytes({}, case.untouched) + prices >= predicted


def test_experts_are_saved_one_by_one_as_published(tmp_path: Path) -> None:
    case = tiny_case("mixtral", tmp_path / "dense")
    folder = written(case, tmp_path / "export")
    data = (folder / "model.safetensors").read_bytes()
    assert b"block_sparse_moe.experts.3.w1.weight" in data
    # Fifteen names are not those in memory, which is why the model has to be asked.
    unfitted = PLAIN.size_bytes(case.job.storages, case.untouched)
    assert unfitted != PLAIN.written_bytes(folder)


def test_shards_are_counted_each_with_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersFolder, "shard_bytes", 30_000)
    case = tiny_case("llama", tmp_path / "dense")
    folder = written(case, tmp_path / "export")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    predicted = fitted(case).size_bytes(case.job.storages, case.untouched)
    assert PLAIN.written_bytes(folder) == predicted
    assert torch.equal(case.logits(PLAIN.load(folder)), case.logits())


def test_settings_for_generation_that_cannot_be_saved_do_not_matter(
    tmp_path: Path,
) -> None:
    case = tiny_case("llama", tmp_path / "dense")
    settings = {"do_sample": False, "temperature": 0.2, "top_p": 0.9}
    file = tmp_path / "dense" / "generation_config.json"
    file.write_text(json.dumps(settings))
    written(case, tmp_path / "export")
    # Whoever assembles the folder copies the dense model's own.
    assert not (tmp_path / "export" / "generation_config.json").exists()


def test_a_folder_without_a_marker_is_a_causal_model(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    assert type(PLAIN.load(tmp_path)).__name__ == "GPT2LMHeadModel"


def test_another_target_is_refused(tmp_path: Path) -> None:
    folder = written(tiny_case("llama", tmp_path / "dense"), tmp_path / "export")
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**marker, "target": "gguf"}))
    with pytest.raises(ExportError, match="target 'gguf', not 'transformers'"):
        PLAIN.load(folder)


@pytest.mark.parametrize("cut", [0, 100])
def test_a_damaged_file_is_named(cut: int, tmp_path: Path) -> None:
    folder = written(tiny_case("llama", tmp_path / "dense"), tmp_path / "export")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(
        ExportError, match=r"export.model\.safetensors is missing or dam"
    ):
        PLAIN.load(folder)
    file.unlink()
    with pytest.raises(ExportError, match="export has no weights: neither model.safe"):
        PLAIN.load(folder)


def test_it_does_not_change_the_dense_file(tmp_path: Path) -> None:
    case = tiny_case("llama", tmp_path / "dense")
    before = (tmp_path / "dense" / "model.safetensors").read_bytes()
    written(case, tmp_path / "export")
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == before
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(case.logits(fresh), case.logits(case.dense))
