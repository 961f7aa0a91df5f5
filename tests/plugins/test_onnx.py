"""A graph for ONNX Runtime, with every weight once in a file of known size."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.onnx_file import OTHER_CODE, OnnxFile
from autoprune_plugins.tasks import CausalLM
from tiny_cuts import cut_case
from tiny_exports import Case, tiny_case
from tiny_sites import site_case

from autoprune.errors import ExportError
from autoprune.exporting.marker import MARKER
from autoprune.targets import onnx_graph

for package in onnx_graph.PACKAGES:
    pytest.importorskip(package)

TARGET = OnnxFile()
HALF = "channels(keep=0.5, score=magnitude)"
HEAD = "heads(keep=0.5, score=magnitude)"
CUT = {
    "blocks.0.mlp": HALF,
    "blocks.0.attention": HEAD,
    "blocks.1.block": "drop",
}


def exported(case: Case, folder: Path) -> tuple[OnnxFile, Any]:
    """Write and check sizes and logits; give the exporter and the loaded graph."""
    folder.mkdir()
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    storages = case.job.storages
    assert not any(exporter.refuses(la, s) for la, s in storages.items())
    assert exporter.write(folder, case.job) == {}
    predicted = exporter.size_bytes(storages, case.untouched)
    assert exporter.written_bytes(folder) == predicted
    prices = [exporter.layer_bytes(la, s) for la, s in storages.items()]
    assert predicted <= exporter.size_bytes({}, case.untouched) + sum(prices)
    model = exporter.load(folder)
    logits = case.logits(model)
    torch.testing.assert_close(logits, case.logits().float(), rtol=1e-3, atol=1e-4)
    return exporter, model


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, Any]:
    folder = tmp_path_factory.mktemp("cut")
    case = cut_case("llama", folder / "dense", CUT)
    return case, folder / "export", exported(case, folder / "export")[1]


def test_a_cut_model_runs_as_a_graph(cut: tuple[Case, Path, Any]) -> None:
    case, folder, model = cut
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    assert (folder / onnx_graph.WEIGHTS).stat().st_size == 4 * sum(
        # An embedding, a head and a norm; one block, half as wide.
        [64 * 32, 64 * 32, 32, 2 * 32, 3 * 32 * 24, 2 * 32 * 16, 2 * 32 * 8]
    )
    assert (folder / onnx_graph.GRAPH).stat().st_size < 500_000
    notes = exporter.notes(case.job.storages)
    assert notes[-1].startswith("secondary: logits of whole sequences, without a cache")
    assert exporter.bounds(case.job.storages) == OTHER_CODE
    for batch, length in ((1, 1), (2, 5), (3, 40)):
        ids = torch.arange(batch * length).view(batch, length) % 64
        with torch.inference_mode():
            expected = case.model(ids).logits
            torch.testing.assert_close(
                model(ids).logits, expected, rtol=1e-3, atol=1e-4
            )


def test_a_task_measures_it_as_any_model(cut: tuple[Case, Path, Any]) -> None:
    case, _, model = cut
    task = CausalLM()
    batch = task.batch(torch.arange(24).view(2, 12) + 3, None)
    losses = []
    with torch.inference_mode():
        for one in (model, case.model):
            features, head = task.features(one, batch), task.head(one)
            losses.append(head.losses(features, batch.labels))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


def damage_weights(folder: Path) -> None:
    data = bytearray((folder / onnx_graph.WEIGHTS).read_bytes())
    data[5] ^= 1
    (folder / onnx_graph.WEIGHTS).write_bytes(data)


def change_marker(folder: Path, **changes: Any) -> None:
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**marker, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, r"model.onnx.data is damaged: its SHA-256 is [0-9a-f]{64}"),
        (lambda f: (f / onnx_graph.GRAPH).unlink(), "model.onnx is damaged: .*missing"),
        (lambda f: (f / "config.json").unlink(), "cannot open the export .*config"),
        (lambda f: change_marker(f, head={}), "cannot open the export .*KeyError"),
        (lambda f: change_marker(f, head=None), "'head' is None, expected dict"),
    ],
)
def test_damage_is_told(
    damage: Callable[[Path], object],
    message: str,
    cut: tuple[Case, Path, Any],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    for file in cut[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    with pytest.raises(ExportError, match=message):
        TARGET.load(folder)


def test_a_package_that_is_absent_is_named(
    cut: tuple[Case, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder, _ = cut
    found = importlib.util.find_spec

    def hidden(name: str) -> Any:
        return None if name == "onnxruntime" else found(name)

    monkeypatch.setattr("autoprune_plugins.onnx_file.find_spec", hidden)
    layer, storage = next(iter(case.job.storages.items()))
    told = r"onnxruntime is not installed; pip install 'autoprune\[onnx\]'"
    reason = TARGET.refuses(layer, storage)
    assert reason == told.replace("\\", "")
    with pytest.raises(ExportError, match="pip install 'autoprune"):
        TARGET.load(folder)
    with pytest.raises(ExportError, match=told):
        TARGET.write(folder, case.job)


def test_other_weights_in_the_graph_are_told(
    cut: tuple[Case, Path, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case, folder, _ = cut

    def copied(_: Any, made: Path) -> dict[str, int]:
        """Give the graph of another policy."""
        for file in (onnx_graph.GRAPH, onnx_graph.WEIGHTS):
            (made / file).write_bytes((folder / file).read_bytes())
        return {"lm_head.weight": 0}

    monkeypatch.setattr("autoprune_plugins.onnx_file.write_graph", copied)
    dense = tiny_case("llama", tmp_path / "dense", ["dense"])
    with pytest.raises(ExportError, match="gives other logits than the model: they"):
        TARGET.write(tmp_path, dense.job)


def test_what_it_cannot_hold_is_refused(
    cut: tuple[Case, Path, Any], tmp_path: Path
) -> None:
    case = cut[0]
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    layer = next(la for la in case.job.storages if la.role == "o_proj")
    storage = case.job.storages[layer]
    rotated = exporter.refuses(layer, replace(storage, hidden=16))
    assert rotated == "the target onnx does not rotate; the target transformers does"
    permuted = exporter.refuses(layer, replace(storage, permuted=True))
    assert permuted is not None and "belong to heads" in permuted
    masked = tiny_case("bert", tmp_path / "dense", ["dense"])
    with pytest.raises(ExportError, match="classifiers of images, not AutoModelForM"):
        TARGET.write(tmp_path, masked.job)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "opt", "mistral", "qwen3"])
def test_every_form_of_weights(kind: str, tmp_path: Path) -> None:
    case = tiny_case(kind, tmp_path / "dense")
    exported(case, tmp_path / "export")


@pytest.mark.slow
def test_biases_and_orders(tmp_path: Path) -> None:
    policy = {
        "blocks.0.mlp": "flap(keep=0.5)",
        "blocks.1.down": "ria(pattern=2:4, permute=true)",
    }
    exported(site_case("llama", tmp_path / "dense", policy), tmp_path / "export")


@pytest.mark.slow
def test_code_that_cannot_be_traced_is_told(tmp_path: Path) -> None:
    case = tiny_case("mixtral", tmp_path / "dense", ["dense"])
    with pytest.raises(
        ExportError, match="MixtralForCausalLM cannot be written as ONN"
    ):
        TARGET.write(tmp_path, case.job)
