"""A convolutional network becomes a graph without the filters that are gone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.conv_digits import train_resnet
from autoprune_plugins.onnx_file import OTHER_CODE
from tiny_convnets import bench_of, pixels, policy_on, tiny_resnet, write_resnet

from autoprune.config import RunConfig
from autoprune.deliver import export
from autoprune.evaluation.workbench import Workbench
from autoprune.exporting.verification import verify
from autoprune.plugins import load_plugins
from autoprune.run import search
from autoprune.targets import onnx_graph

for package in onnx_graph.PACKAGES:
    pytest.importorskip(package)

SMALLEST = {"hidden_sizes": [4, 8], "depths": [1, 1]}


def opened(folder: Path, layer_type: str, **settings: Any) -> Workbench:
    write_resnet(folder / "model", tiny_resnet(layer_type, **settings))
    plugins = load_plugins()
    return bench_of(folder / "model", plugins, folder / "cache", target="onnx")


def exported(bench: Workbench, folder: Path, kind: str, text: str) -> Any:
    """Write a policy, check sizes and logits, and give the loaded graph."""
    folder.mkdir()
    policy, bank = policy_on(bench, kind, text), bench.bank()
    job, exporter = bench.job(policy, bank), bench.exporters["onnx"]
    assert not any(exporter.refuses(la, s) for la, s in job.storages.items())
    assert exporter.write(folder, job) == {}
    predicted = exporter.size_bytes(job.storages, bench.untouched)
    assert exporter.written_bytes(folder) == predicted
    prices = [exporter.layer_bytes(la, s) for la, s in job.storages.items()]
    rest = exporter.size_bytes({}, bench.untouched)
    # Sums of prices still have the norms of what is gone, and rows of shortcuts.
    assert predicted <= rest + sum(prices) < bench.scene().dense_bytes
    bank.put(bench.per_layer(policy))
    model = exporter.load(folder)
    for count, side in ((1, 16), (3, 40)):
        with torch.inference_mode():
            expected = bench.stitched.model(pixels(count, side)).logits
        found = model(pixel_values=pixels(count, side)).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return model


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workbench, Path, Any]:
    folder = tmp_path_factory.mktemp("cut")
    bench = opened(folder, "basic", **SMALLEST)
    model = exported(bench, folder / "export", "channels", "filters(keep=0.5)")
    return bench, folder / "export", model


def test_a_graph_has_only_the_filters_that_stay(
    cut: tuple[Workbench, Path, Any],
) -> None:
    bench, folder, _ = cut
    onnx: Any = pytest.importorskip("onnx")
    graph = onnx.load(folder / onnx_graph.GRAPH, load_external_data=False).graph
    shapes = {one.name: tuple(one.dims) for one in graph.initializer}
    inside = "model.resnet.encoder.stages.1.layers.0.layer"
    assert shapes[f"{inside}.0.convolution.weight"] == (4, 4, 3, 3)  # of 8 filters
    assert shapes[f"{inside}.0.normalization.running_mean"] == (4,)
    assert shapes[f"{inside}.1.convolution.weight"] == (8, 4, 3, 3)
    assert (folder / onnx_graph.WEIGHTS).stat().st_size == 4 * sum(
        # The stem with its norm, two blocks, a shortcut, a head.
        [4 * 49 + 16, 2 * 4 * 2 * 9 + 8 + 16, 4 * 4 * 9 + 16 + 8 * 4 * 9 + 32]
        + [8 * 4 + 32, 10 * 8 + 10]
    )
    policy = policy_on(bench, "channels", "filters(keep=0.5)")
    exporter, storages = bench.exporters["onnx"], bench.storages(policy)
    assert exporter.bounds(storages) == OTHER_CODE
    notes = exporter.notes(storages)
    assert notes[0] == "cut channels: 6 of 12 stay, sites: 2"
    assert notes[1].startswith("logits of images of any size that the model takes; wei")
    usage = exporter.usage("here", bench.task.auto_class)
    assert '{"pixel_values": pixel_values}' in usage


def test_a_task_measures_it_as_any_model(cut: tuple[Workbench, Path, Any]) -> None:
    bench, _, model = cut
    task = bench.task
    batch = task.batch(bench.splits["fitness"].ids, bench.tokenizer)
    losses = []
    with torch.inference_mode():
        for one in (model, bench.stitched.model):
            features, head = task.features(one, batch), task.head(one)
            losses.append(head.losses(features, batch.labels))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("stream", "stream_filters(keep=0.5)"),
        ("channels", "flap(keep=0.5)"),
        ("channels", "ziplm(keep=0.5) + gptq(bits=4)"),
    ],
)
def test_streams_biases_and_codes(
    layer_type: str, kind: str, text: str, tmp_path: Path
) -> None:
    exported(opened(tmp_path, layer_type), tmp_path / "export", kind, text)


@pytest.mark.slow
def test_filters_are_searched_exported_and_verified(tmp_path: Path) -> None:
    model = tmp_path / "model"
    train_resnet(model, epochs=1, embedding_size=8, **SMALLEST)
    few = {"statistics": 60, "fitness": 40, "choice": 40, "report": 40}
    config = RunConfig.model_validate(
        {
            "model": str(model),
            "task": "image-classification",
            "text": {"source": "digits:test", **few},
            "space": [
                {"sites": "blocks.*.filters", "actions": ["filters(keep=[0.25, 0.5])"]}
            ],
            "objective": {"metric": "kl", "budgets": {"size_bytes": "80%"}},
            "search": {"trials": 4, "seed": 0, "finalists": 1},
            "export": "onnx",
        }
    )
    result = search(config, tmp_path / "run")
    winner, dense = result.finals["winner"]["report"], result.finals["dense"]
    assert winner["size_bytes"] <= 0.8 * dense["size_bytes"]
    (report,) = export(tmp_path / "run")
    assert report.size_bytes == winner["size_bytes"]
    again = verify(report.folder)
    assert again is not None and again.size_bytes == report.size_bytes
    assert again.logits < 1e-3
