"""Loads an export where nothing is in memory yet, and measures it.

``python -m autoprune.exporting.fresh_process`` reads a request as JSON from standard
input, and answers in JSON.
"""

import json
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from autoprune.errors import AutoPruneError
from autoprune.exporting.digests import digests_of
from autoprune.exporting.marker import exporter_of
from autoprune.exporting.probe import Probe
from autoprune.models.checkpoints import Checkpoint
from autoprune.models.computing import compute_in, computing_in
from autoprune.models.task import Task
from autoprune.plugins import load_plugins


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load an export and measure it; what the fresh process does.

    Raises:
        ExportError: If the export does not load.
        PluginError: If its target or its task is not known.
    """
    torch.set_num_threads(request["threads"])
    folder = Path(request["folder"])
    plugins = load_plugins(request["plugins"])
    task: Task = plugins.get("tasks", request["task"])
    exporter = exporter_of(folder, plugins)
    start = time.monotonic()
    model = exporter.load(folder)
    load_seconds = time.monotonic() - start
    digests = digests_of(model, request.get("layers", ()))
    if request["dtype"]:
        compute_in(model, getattr(torch, request["dtype"]))
    tokenizer = task.load_tokenizer(Checkpoint(str(folder), folder, ""))
    with torch.inference_mode():
        head = task.head(model)
        losses = []
        for ids in torch.tensor(request["ids"]).split(request["batch"]):
            batch = task.batch(ids, tokenizer)
            features = task.features(model, batch)
            nll = head.losses(features, batch.labels)
            counts = batch.scored.sum(1).tolist()
            pieces = nll.split(counts)
            losses += [window.mean() for window in pieces]
    mean = torch.stack(losses).double().mean()
    probe = None
    if wanted := request.get("probe"):
        ids = torch.tensor(wanted["ids"])
        classes = wanted["classes"]
        with (
            computing_in(model, torch.float32)
            if request.get("in_float32")
            else nullcontext()
        ):
            probe = Probe.take(task, model, tokenizer, ids, classes=classes).to_dict()
    return {
        "perplexity": float(mean.exp()),
        "size_bytes": exporter.written_bytes(folder),
        "load_seconds": round(load_seconds, 2),
        "layers": digests,
        "probe": probe,
    }


def main() -> None:
    """Answer the request on standard input with one line on standard output."""
    request = json.loads(sys.stdin.read())
    answer: dict[str, Any]
    try:
        with redirect_stdout(sys.stderr):  # whatever a plugin or a library says
            answer = measure(request)
    except AutoPruneError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
