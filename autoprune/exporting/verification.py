"""Has an export loaded again by a fresh process, and compares it with the record."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from autoprune.errors import ExportError
from autoprune.exporting.exporter import EXACT, Bounds
from autoprune.exporting.manifest import MANIFEST, check_files, read_manifest
from autoprune.exporting.probe import Probe


@dataclass(frozen=True, slots=True)
class Verification:
    """What a fresh process found.

    Attributes:
        perplexity: Of the export, on the windows given.
        expected_perplexity: Of the model that was exported, on the same windows.
        size_bytes: Of the weight files, as predicted.
        seconds: Time of the process, loading included.
        layers: Layers whose weights are to the bit what was exported.
        logits: Largest difference of a log-probability, in nats; 0 if all logits are
            the same to the bit.
        load_seconds: Time until the model was loaded.
    """

    perplexity: float
    expected_perplexity: float
    size_bytes: int
    seconds: float
    layers: int = 0
    logits: float = 0.0
    load_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Expected:
    """What an export has to be, told by the process that has written it.

    Attributes:
        task: Name of the task.
        ids: Windows of tokens.
        perplexity: Of the model that was exported, on these windows.
        size_bytes: What the exporter had predicted.
        digests: Of its layers; see ``Exporter.write``.
        probe: What the model said on some windows.
        bounds: How far the loaded model may be from it.
        compute_dtype: Type that it was measured in; None for the stored type.
        batch: Windows that pass the model at a time, as they did before.
    """

    task: str
    ids: list[list[int]]
    perplexity: float
    size_bytes: int
    digests: Mapping[str, str] = field(default_factory=dict)
    probe: Probe | None = None
    bounds: Bounds = EXACT
    compute_dtype: str | None = None
    batch: int = 8

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Self:
        """Read from a manifest what the folder beside it has to be.

        Raises:
            ExportError: If the manifest lacks something.
        """
        try:
            probe = Probe.from_dict(manifest["probe"])
            bounds, dtype = Bounds(**manifest["bounds"]), manifest["compute_dtype"]
            return cls(
                task=manifest["task"],
                ids=probe.ids,
                perplexity=probe.perplexity,
                size_bytes=manifest["size_bytes"],
                digests=manifest["layers"],
                probe=probe,
                bounds=bounds,
                # The probe's perplexity is of the type that all of the probe is of.
                compute_dtype="float32" if bounds.in_float32 else dtype,
            )
        except (KeyError, TypeError) as error:
            raise ExportError(
                f"{MANIFEST} lacks what a check needs, or holds it in another form: "
                f"{error}. Export the model again."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Write what a manifest keeps of it; of the windows only the probe's."""
        return {
            "task": self.task,
            "size_bytes": self.size_bytes,
            "compute_dtype": self.compute_dtype,
            "bounds": asdict(self.bounds),
            "layers": dict(self.digests),
            "probe": self.probe.to_dict() if self.probe else None,
        }


def verify_export(
    folder: Path, expected: Expected, *, plugins: Sequence[str] = ()
) -> Verification:
    """Load an export in a fresh process, and compare all that can be compared.

    Args:
        folder: The export.
        expected: What it has to be.
        plugins: Modules to load beside the installed plugins.

    Raises:
        ExportError: If the export does not load, or anything differs; tells both.
    """
    start = time.monotonic()
    answer = _ask(folder, _request(folder, expected, plugins))
    found, written = float(answer["perplexity"]), int(answer["size_bytes"])
    if written != expected.size_bytes:
        raise ExportError(
            f"the export {folder} has {written} bytes of weights, but "
            f"{expected.size_bytes} were predicted: its size is wrong"
        )
    _compare_layers(folder, expected.digests, answer.get("layers", {}))
    bounds, tolerance = expected.bounds, expected.bounds.perplexity
    if not _agree(found, expected.perplexity, tolerance):
        raise ExportError(
            f"the export {folder}, loaded again, has perplexity {found:.6g}, but "
            f"{expected.perplexity:.6g} was measured before (they may differ by "
            f"{tolerance:.1%}): its weights are not what was evaluated"
        )
    apart = 0.0
    if expected.probe:
        apart = _distance(expected.probe, Probe.from_dict(answer["probe"]))
        if bounds.logits is not None and apart > bounds.logits:
            raise ExportError(
                f"the export {folder}, loaded again, gives log-probabilities that "
                f"differ by {apart:.4g} nats from those measured before; at most "
                f"{bounds.logits:g} can be explained"
            )
    return Verification(
        found,
        expected.perplexity,
        written,
        round(time.monotonic() - start, 2),
        len(expected.digests),
        apart,
        float(answer.get("load_seconds", 0.0)),
    )


def verify(folder: str | Path, *, plugins: Sequence[str] = ()) -> Verification | None:
    """Check an export against its manifest: files, layers, logits, perplexity, size.

    Works wherever the folder was copied to; perplexity is that of the few windows that
    the manifest carries.

    Args:
        folder: What ``autoprune export`` has written.
        plugins: Modules to load beside the installed plugins.

    Returns:
        What a fresh process found; None where there are no weights, so that all is said
        once the files are what was written.

    Raises:
        ExportError: If anything differs from what was written; tells what.
        PluginError: If the plugin of its target is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError(
            f"there is no folder {str(folder)!r} (looked in {Path.cwd()}). Name a "
            "folder that 'autoprune export' has written."
        )
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if manifest.get("weights") is False:
        return None
    return verify_export(folder, Expected.of(manifest), plugins=plugins)


def _request(
    folder: Path, expected: Expected, plugins: Sequence[str]
) -> dict[str, Any]:
    return {
        "folder": str(folder.absolute()),
        "ids": expected.ids,
        "task": expected.task,
        "dtype": expected.compute_dtype,
        "batch": expected.batch,
        "plugins": list(plugins),
        "threads": torch.get_num_threads(),
        "layers": list(expected.digests),
        "probe": expected.probe.to_dict() if expected.probe else None,
        "in_float32": expected.bounds.in_float32,
    }


def _compare_layers(
    folder: Path, expected: Mapping[str, str], found: Mapping[str, str]
) -> None:
    wrong = [name for name, sha256 in expected.items() if found.get(name) != sha256]
    if wrong:
        absent = [name for name in wrong if name not in found]
        raise ExportError(
            f"the export {folder}, loaded again, has other weights than were exported "
            f"in {len(wrong)} of {len(expected)} layers, {len(absent)} of them absent; "
            f"first {wrong[0]!r}"
        )


def _distance(expected: Probe, found: Probe) -> float:
    return 0.0 if expected.sha256 == found.sha256 else expected.distance(found)


def _agree(found: float, expected: float, tolerance: float) -> bool:
    if not (math.isfinite(found) and math.isfinite(expected)):
        return math.isfinite(found) == math.isfinite(expected)  # both have diverged
    return math.isclose(found, expected, rel_tol=tolerance)


def _ask(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run the fresh process; it finds the same modules as this one."""
    command = [sys.executable, "-m", "autoprune.exporting.fresh_process"]
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
