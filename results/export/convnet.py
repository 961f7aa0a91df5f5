"""What narrower convolutions are worth: bytes, time and accuracy of the digits ResNet.

    python results/export/convnet.py

A ResNet is trained on the digits of scikit-learn and exported as ONNX: dense, with
filters or channels of the residual stream cut out, and retrained after the cut. One
thread; the graphs take turns on the same images, so that times are compared within one
run. Accuracy is that of 157 images that nothing has seen. Goes to ``convnet.json``.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from autoprune_plugins.conv_digits import train_resnet

from autoprune.config import TextConfig
from autoprune.evaluation.scheduled import own_bank
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Action, Policy

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from recording import tell  # noqa: E402

TRAINED = " + finetune(tokens=400000, batch=16, learning_rate=0.003)"
CASES = {
    "dense": ("channels", "dense", "one-shot"),
    "half of the filters": ("channels", "ziplm(keep=0.5)", "one-shot"),
    "the same, retrained": ("channels", "ziplm(keep=0.5)", f"one-shot{TRAINED}"),
    "a quarter, retrained": ("channels", "ziplm(keep=0.25)", f"one-shot{TRAINED}"),
    "half of the streams": ("stream", "stream_filters(keep=0.5)", "one-shot"),
    "the same streams, retrained": (
        "stream",
        "stream_filters(keep=0.5)",
        f"one-shot{TRAINED}",
    ),
}
REPEATS = {1: 400, 64: 120}
"""How often each graph runs, by the images in a batch."""

WARM_UP = 20


def main() -> None:
    """Train, cut, export and time; write the file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        bench = open_bench(Path(place))
        graphs, rows = {}, {}
        for name, case in CASES.items():
            tell(name)
            graphs[name], rows[name] = export(bench, Path(place) / name, *case)
        for batch, repeats in REPEATS.items():
            tell(f"timing batches of {batch}")
            for name, times in timed(graphs, batch, repeats).items():
                rows[name][f"us_per_image_{batch}"] = times
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "threads": 1,
        "us_per_image": "median, and the quartiles",
    }
    text = json.dumps(about | {"cases": rows}, indent=1)
    (HERE / "convnet.json").write_text(text + "\n")
    print(text)


def open_bench(place: Path) -> Workbench:
    """Train the ResNet, and open it with images that it was not trained on."""
    train_resnet(place / "model", epochs=8)
    return Workbench.open(
        load_plugins(),
        model=str(place / "model"),
        task="image-classification",
        text=TextConfig(
            source="digits:test",
            statistics=64,
            recovery=216,
            fitness=80,
            choice=80,
            report=157,
        ),
        target="onnx",
        seed=0,
        cache=place / "cache",
    )


def export(
    bench: Workbench, folder: Path, kind: str, action: str, schedule: str
) -> tuple[Any, dict[str, Any]]:
    """Export all sites of a kind under an action; give the graph and its figures."""
    asked = bench.actions.canonical(Action.parse(action))
    names = [site.name for site in bench.inventory.groups if site.kind == kind]
    sites = bench.inventory.sites_for(set(names))
    chosen = {one.name: asked if one.name in names else DENSE for one in sites}
    policy = Policy(chosen, schedule)
    bank, exporter = own_bank(bench, policy), bench.exporters["onnx"]
    bank.make(bench.per_layer(policy).items())
    job = bench.job(policy, bank)
    folder.mkdir()
    exporter.write(folder, job)
    size = exporter.written_bytes(folder)
    assert size == exporter.size_bytes(job.storages, bench.untouched)
    metrics = bench.measure(policy, bank, "report").metrics
    about = {"action": action, "schedule": schedule, "bytes": size}
    return exporter.load(folder), about | {"accuracy": metrics["accuracy"]}


def timed(
    graphs: dict[str, Any], batch: int, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """Time the graphs in turn; microseconds an image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, 32, 32, generator=generator)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            began = time.perf_counter()
            graph(pixel_values=images)
            times[name].append(time.perf_counter() - began)
    found = {}
    for name, all_times in times.items():
        kept = np.array(all_times[WARM_UP:]) / batch * 1e6
        low, high = np.percentile(kept, [25, 75])
        middle = statistics.median(kept.tolist())
        found[name] = round(middle, 1), round(float(low), 1), round(float(high), 1)
    return found


if __name__ == "__main__":
    main()
