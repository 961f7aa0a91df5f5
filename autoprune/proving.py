"""Runs an export with real kernels, and sets what it takes beside the prediction."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autoprune.compression.storage import Storage
from autoprune.evaluation.anatomy import Anatomy
from autoprune.evaluation.timed import notes_on, read_workloads
from autoprune.exporting.folder import load
from autoprune.latency.comparing import compare
from autoprune.latency.device import Device
from autoprune.latency.estimate import Estimate
from autoprune.latency.model_running import pass_of
from autoprune.latency.opening import open_device
from autoprune.latency.running import generator_on
from autoprune.latency.shape import ModelShape
from autoprune.latency.timing import CudaTimer
from autoprune.latency.whole_models import Step
from autoprune.latency.workload import Workload
from autoprune.models.layers import inventory
from autoprune.models.task import output_layer
from autoprune.plugins import load_plugins
from autoprune.serving import storages_of, use_kernels


@dataclass(frozen=True, slots=True)
class Proof:
    """One pass of an export, predicted and measured.

    Attributes:
        workload: Name of the workload.
        phase: ``prefill``, or ``decode`` for one step at the mean context.
        predicted_ms: What was predicted.
        interval_ms: What holds the time in 80 of 100 cases.
        measured_ms: What it took: the median.
        dense_ms: What the same model took with dense kernels.
        ratio: Measured over dense.
        predicted_ratio: The same as it was predicted.
        noisy: True if even the dense model against itself looked different.
    """

    workload: str
    phase: str
    predicted_ms: float
    interval_ms: tuple[float, float]
    measured_ms: float
    dense_ms: float
    ratio: float
    predicted_ratio: float
    noisy: bool

    @property
    def error(self) -> float:
        """How far the prediction is off, over what was measured."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True, eq=False)
class Proven:
    """What running an export told.

    Attributes:
        device: Where it ran.
        basis: What predictions come from.
        kernels: How many layers ran on each kernel but the dense one.
        proofs: One a phase and workload.
        notes: What a user should know.
    """

    device: str
    basis: str
    kernels: Mapping[str, int]
    proofs: tuple[Proof, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data, ready for JSON."""
        return asdict(self)


def prove(
    folder: str | Path,
    *,
    device: str = "auto",
    workloads: Sequence[str] = ("decode",),
    plugins: Sequence[str] = (),
    seconds: float = 60.0,
) -> Proven:
    """Run an export on this machine, and the same model with dense kernels.

    Args:
        folder: An export, or any folder that transformers loads.
        device: Whose profile predicts: ``auto``, ``cpu``, or a profile's folder.
        workloads: Names of workloads.
        plugins: Modules to load beside the installed plugins.
        seconds: For each phase at most, warm-up aside.

    Raises:
        ExportError: If the folder is no export.
        ProfileError: If nothing is known of the device.
    """
    place, loaded = Path(folder), load_plugins(plugins)
    opened = open_device(device, loaded.objects["latency_backends"].values())
    asked = read_workloads(workloads, opened)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    proofs, kernels = list[Proof](), dict[str, int]()
    for work in asked:
        dense: Any = load(place, plugins=plugins)
        dense = dense.to(kind, getattr(torch, work.dtype))
        found = inventory(dense, list(loaded.objects["architectures"].values()))
        storages = storages_of(place, dense, found, loaded)
        anatomy = Anatomy.of(
            dense.config, found, vocabulary=output_layer(dense).weight.shape[0]
        )
        compressed = deepcopy(dense)
        kernels = use_kernels(compressed, storages, opened, work)
        plain = {layer: Storage.dense(layer) for layer in found.layers}
        shapes = anatomy.shape(storages), anatomy.shape(plain)
        proofs += _phases(opened, work, (compressed, dense), shapes, seconds)
    return Proven(
        opened.name, opened.basis, kernels, tuple(proofs), tuple(notes_on(opened))
    )


def _phases(
    device: Device,
    work: Workload,
    models: tuple[Any, Any],
    shapes: tuple[ModelShape, ModelShape],
    seconds: float,
) -> Iterator[Proof]:
    contexts = work.decode_contexts
    middle = contexts[len(contexts) // 2]
    steps = {
        "prefill": (Step("model_prefill", work.batch, work.prompt), work.prompt),
        "decode": (Step("model_decode", work.batch, middle), 1),
    }
    for phase, (step, new) in steps.items():
        foretold, plain = (
            device.predictor.step(
                shape,
                work.batch,
                new,
                step.context,
                dtype=work.dtype,
                execution=work.execution,
            )
            for shape in shapes
        )
        measured, dense, noisy = _measured(models, step, seconds)
        yield _proof(work.name, phase, foretold, plain, measured, dense, noisy)


def _proof(
    workload: str,
    phase: str,
    foretold: Estimate,
    plain: Estimate,
    measured: float,
    dense: float,
    noisy: bool,
) -> Proof:
    return Proof(
        workload,
        phase,
        foretold.ms,
        foretold.interval,
        measured,
        dense,
        measured / dense,
        foretold.ms / plain.ms,
        noisy,
    )


def _measured(
    models: tuple[Any, Any], step: Step, seconds: float
) -> tuple[float, float, bool]:
    """Give milliseconds of a pass: compressed, dense; and whether it was noisy."""
    compressed, dense = models
    kind = dense.device.type
    generator = generator_on(kind, 0)
    calls = {
        name: pass_of(model, step, generator)
        for name, model in (("dense", dense), ("compressed", compressed))
    }
    if kind == "cuda":
        timer = CudaTimer(replay_ms=4.0)
        times = {name: timer.time([call]).us / 1e3 for name, call in calls.items()}
        return times["compressed"], times["dense"], False
    again = pass_of(deepcopy(dense), step, generator)
    found = compare(calls, double=again, seconds=seconds)
    times = {name: one.timing.us / 1e3 for name, one in found.found.items()}
    return times["compressed"], times["dense"], found.noisy
