"""An export is loaded in a fresh process and compared with what was measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.packed import WEIGHTS, Packed
from autoprune_plugins.tasks import register_tasks
from autoprune_plugins.transformers_folder import TransformersFolder
from tiny_exports import FORMS, Case, case_of
from tiny_models import tiny
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from autoprune.compression.apply import StitchedModel
from autoprune.errors import ExportError
from autoprune.evaluation.teacher import Teacher
from autoprune.exporting.exporter import EXACT, Bounds, Exporter
from autoprune.exporting.fresh_process import measure
from autoprune.exporting.probe import Probe
from autoprune.exporting.verification import Expected, verify_export
from autoprune.models.text import TokenWindows

CAUSAL, MASKED = register_tasks()


def made(
    exporter: Exporter, checkpoint: Path, tokenizer: PreTrainedTokenizerFast
) -> tuple[Path, Case]:
    case = case_of(checkpoint, "AutoModelForCausalLM", list(FORMS))
    folder = checkpoint.parent / "export"
    folder.mkdir()
    exporter.write(folder, case.job)
    tokenizer.save_pretrained(folder)
    return folder, case


@pytest.fixture
def ids(rng: torch.Generator) -> Tensor:
    return torch.randint(0, 64, (5, 24), generator=rng)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def evaluated(case: Case, ids: Tensor, dtype: torch.dtype | None = None) -> float:
    """Measure as a search does."""
    if dtype is not None:
        StitchedModel(case.model, case.job.inventory.layers, compute_dtype=dtype)
    windows = TokenWindows(ids, "report", "drawn", "0" * 16)
    teacher = Teacher(CAUSAL, case.model, windows, tokenizer=None, batch=2)
    return teacher.dense.perplexity


def request(folder: Path, ids: Tensor, **changes: Any) -> dict[str, Any]:
    plain = {"folder": str(folder), "ids": ids.tolist(), "task": "causal-lm"}
    more = {"dtype": None, "batch": 2, "plugins": [], "threads": 1}
    return {**plain, **more, **changes}


@pytest.mark.parametrize("exporter", [Packed(), TransformersFolder()])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_measures_what_the_evaluation_does(
    exporter: Exporter,
    dtype: torch.dtype | None,
    checkpoint: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
) -> None:
    folder, case = made(exporter, checkpoint, tiny_tokenizer)
    name = str(dtype).removeprefix("torch.") if dtype else None
    found = measure(request(folder, ids, dtype=name))
    assert found["perplexity"] == pytest.approx(evaluated(case, ids, dtype), rel=1e-6)
    assert found["size_bytes"] == exporter.written_bytes(folder)


def test_a_fresh_process_agrees(
    checkpoint: Path, tiny_tokenizer: PreTrainedTokenizerFast, ids: Tensor
) -> None:
    folder, case = made(Packed(), checkpoint, tiny_tokenizer)
    expected = evaluated(case, ids)
    size = Packed().size_bytes(case.job.storages, case.untouched)
    probe = Probe.take(CAUSAL, case.model, None, ids)
    told = Expected("causal-lm", ids.tolist(), expected, size, {}, probe, batch=2)
    found = verify_export(folder, told)
    assert found.logits == 0  # to the bit
    assert found.perplexity == pytest.approx(expected, rel=1e-6)
    assert (found.expected_perplexity, found.size_bytes) == (expected, size)
    assert found.seconds > 0


def test_differences_are_told_with_both_numbers(
    checkpoint: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, case = made(Packed(), checkpoint, tiny_tokenizer)
    expected = evaluated(case, ids)
    size = Packed().written_bytes(folder)
    answers = measure(request(folder, ids))
    # The comparison alone: the process itself is tested above and below.
    monkeypatch.setattr("autoprune.exporting.verification._ask", lambda *_: answers)
    told = Expected("causal-lm", ids.tolist(), expected, size)
    near = replace(told, perplexity=expected * (1 + 0.5 * EXACT.perplexity))
    assert verify_export(folder, near).size_bytes == size
    with pytest.raises(ExportError, match=rf"perplexity {expected:.6g}, but 2e\+06"):
        verify_export(folder, replace(told, perplexity=2e6))
    with pytest.raises(ExportError, match=r"but inf was measured"):
        verify_export(folder, replace(told, perplexity=float("inf")))
    with pytest.raises(ExportError, match=rf"has {size} bytes .* {size + 1} were pred"):
        verify_export(folder, replace(told, size_bytes=size + 1))


def test_layers_and_logits_that_differ_are_told(
    checkpoint: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, case = made(Packed(), checkpoint, tiny_tokenizer)
    probe = Probe.take(CAUSAL, case.model, None, ids)
    names = [layer.name for layer in case.job.inventory.layers]
    asked = {"layers": [*names, "no.such.layer"], "probe": probe.to_dict()}
    answers = measure(request(folder, ids, **asked))
    monkeypatch.setattr("autoprune.exporting.verification._ask", lambda *_: answers)
    digests = answers["layers"]
    assert list(digests) == names  # each is found; one that is not there is left out
    size, perplexity = answers["size_bytes"], answers["perplexity"]
    told = Expected("causal-lm", ids.tolist(), perplexity, size, digests, probe)
    assert verify_export(folder, told).layers == len(names)
    wrong = {**digests, names[3]: "0" * 64, "no.such.layer": "1" * 64}
    message = rf"in 2 of {len(names) + 1} layers, 1 of them absent; first '{names[3]}'"
    with pytest.raises(ExportError, match=message):
        verify_export(folder, replace(told, digests=wrong))
    far = [[value + 0.25 for value in row] for row in probe.logprobs]
    other = replace(probe, logprobs=far, sha256="0" * 64)
    with pytest.raises(ExportError, match=r"differ by 0\.25 nats .* at most 0\.05 can"):
        verify_export(folder, replace(told, probe=other))
    loose = replace(told, probe=other, bounds=Bounds(1e-3, None, "rounded"))
    assert verify_export(folder, loose).logits == pytest.approx(0.25, abs=1e-5)


def test_one_wrong_layer_is_found(
    checkpoint: Path, tiny_tokenizer: PreTrainedTokenizerFast, ids: Tensor
) -> None:
    folder, case = made(TransformersFolder(), checkpoint, tiny_tokenizer)
    model = TransformersFolder().load(folder)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(0.9)
    model.save_pretrained(folder)
    found = measure(request(folder, ids))["perplexity"]
    assert abs(found / evaluated(case, ids) - 1) > 2 * EXACT.perplexity


def test_a_diverged_model_agrees_with_itself(
    checkpoint: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = made(Packed(), checkpoint, tiny_tokenizer)
    answers = {"perplexity": float("nan"), "size_bytes": 7}
    monkeypatch.setattr("autoprune.exporting.verification._ask", lambda *_: answers)
    told = Expected("causal-lm", ids.tolist(), float("inf"), 7)
    verify_export(folder, told)
    with pytest.raises(ExportError, match=r"has perplexity nan, but 12 was measured"):
        verify_export(folder, replace(told, perplexity=12.0))


def test_a_folder_that_does_not_load_is_told(tmp_path: Path, ids: Tensor) -> None:
    with pytest.raises(ExportError, match=r"cannot be verified: there is no folder"):
        verify_export(tmp_path / "gone", Expected("causal-lm", ids.tolist(), 1.0, 1))


def test_a_process_that_fails_is_told(
    checkpoint: Path, tiny_tokenizer: PreTrainedTokenizerFast, ids: Tensor
) -> None:
    folder, _ = made(Packed(), checkpoint, tiny_tokenizer)
    told = Expected("causal-lm", (ids + 60).tolist(), 1.0, 1)  # it knows 64 words
    with pytest.raises(ExportError, match=r"its process ended with 1: IndexError"):
        verify_export(folder, told)


def test_masked_language_modelling(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, ids: Tensor
) -> None:
    tiny("bert").save_pretrained(tmp_path / "dense")
    case = case_of(tmp_path / "dense", "AutoModelForMaskedLM", list(FORMS))
    folder = tmp_path / "export"
    folder.mkdir()
    Packed().write(folder, case.job)
    tokenizer = tiny_tokenizer.__class__(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, mask_token="!"
    )
    tokenizer.save_pretrained(folder)
    windows = TokenWindows(ids, "report", "drawn", "0" * 16)
    teacher = Teacher(MASKED, case.model, windows, tokenizer=tokenizer, batch=2)
    found = measure(request(folder, ids, task="masked-lm"))
    assert found["perplexity"] == pytest.approx(teacher.dense.perplexity, rel=1e-6)
    assert (folder / WEIGHTS).exists()
