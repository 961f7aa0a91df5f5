"""Loads an export again in a fresh process and compares it with what was measured.

``python -m autoprune.exporting.verification`` is that process: it reads a request as
JSON from its standard input and answers in JSON.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from autoprune.errors import AutoPruneError, ExportError
from autoprune.exporting.marker import exporter_of
from autoprune.models.checkpoints import Checkpoint, load_tokenizer
from autoprune.models.task import Task
from autoprune.plugins import load_plugins

TOLERANCE = 1e-3
"""Largest relative difference of the perplexities.

The same weights pass through the same code in the same type: on one machine the two
agree bit for bit (measured). The bound leaves room for a figure that was measured on
another, which adds bfloat16 products in another order: it is the difference up to which
bfloat16 counts as the same as float32 here.
"""

ROTATED_TOLERANCE = 1e-2
"""The same where the hidden state was rotated, and every weight rounded once more.

Measured in bfloat16: 0.0008 on SmolLM2-135M, 0.005 on a random model of width 64.
"""


@dataclass(frozen=True, slots=True)
class Verification:
    """What a fresh process found.

    Attributes:
        perplexity: Of the export, on the windows given.
        expected_perplexity: Of the model that was exported, on the same windows.
        size_bytes: Of the weight files, as predicted.
        seconds: Time of the process, loading included.
    """

    perplexity: float
    expected_perplexity: float
    size_bytes: int
    seconds: float


def verify_export(
    folder: Path,
    ids: Int[Tensor, "windows length"],
    *,
    task: str,
    perplexity: float,
    size_bytes: int,
    compute_dtype: torch.dtype | None = None,
    batch: int = 8,
    plugins: Sequence[str] = (),
    tolerance: float = TOLERANCE,
) -> Verification:
    """Load an export in a fresh process, and compare perplexity and size.

    Args:
        folder: The export.
        ids: Windows of tokens.
        task: Name of the task.
        perplexity: What was measured on these windows before.
        size_bytes: What the exporter had predicted.
        compute_dtype: Type that perplexity was measured in; None for the stored type.
        batch: Windows that pass the model at a time, as they did before.
        plugins: Modules to load beside the installed plugins.
        tolerance: Largest relative difference of the perplexities.

    Raises:
        ExportError: If the export does not load, or a figure differs; tells both.
    """
    start = time.monotonic()
    request = {
        "folder": str(folder.absolute()),
        "ids": ids.tolist(),
        "task": task,
        "dtype": str(compute_dtype).removeprefix("torch.") if compute_dtype else None,
        "batch": batch,
        "plugins": list(plugins),
        "threads": torch.get_num_threads(),
    }
    answer = _ask(folder, request)
    found, written = float(answer["perplexity"]), int(answer["size_bytes"])
    if written != size_bytes:
        raise ExportError(
            f"the export {folder} has {written} bytes of weights, but {size_bytes} "
            "were predicted: its size is wrong"
        )
    if not _agree(found, perplexity, tolerance):
        raise ExportError(
            f"the export {folder}, loaded again, has perplexity {found:.6g}, but "
            f"{perplexity:.6g} was measured before (they may differ by "
            f"{tolerance:.1%}): its weights are not what was evaluated"
        )
    return Verification(found, perplexity, written, round(time.monotonic() - start, 2))


def _agree(found: float, expected: float, tolerance: float) -> bool:
    if not (math.isfinite(found) and math.isfinite(expected)):
        return math.isfinite(found) == math.isfinite(expected)  # both have diverged
    return math.isclose(found, expected, rel_tol=tolerance)


def _ask(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run the fresh process; it finds the same modules as this one."""
    command = [sys.executable, "-m", "autoprune.exporting.verification"]
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run(
        command,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    lines = done.stdout.splitlines()
    answer = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    if "perplexity" not in answer:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        reason = answer.get(
            "error", f"its process ended with {done.returncode}: {last}"
        )
        raise ExportError(f"the export {folder} cannot be verified: {reason}")
    return dict(answer)


def measure(request: dict[str, Any]) -> dict[str, float]:
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
    model = exporter.load(folder)
    if request["dtype"]:
        for parameter in model.parameters():  # buffers keep the precision they need
            parameter.data = parameter.data.to(getattr(torch, request["dtype"]))
    tokenizer = load_tokenizer(Checkpoint(str(folder), folder, ""))
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
    return {
        "perplexity": float(mean.exp()),
        "size_bytes": exporter.written_bytes(folder),
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
