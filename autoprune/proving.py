"""Runs an export with real kernels, and sets what it takes beside the prediction."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.compression.actions import Actions
from autoprune.compression.storage import Storage
from autoprune.evaluation.anatomy import Anatomy, linears_of
from autoprune.evaluation.timed import notes_on, read_workloads
from autoprune.exporting.folder import POLICY_FILE, load
from autoprune.exporting.marker import read_marker
from autoprune.latency.comparing import compare
from autoprune.latency.device import Device
from autoprune.latency.estimate import Estimate
from autoprune.latency.kernels import KERNELS
from autoprune.latency.model_running import KernelLinear, pass_of
from autoprune.latency.opening import open_device
from autoprune.latency.running import generator_on
from autoprune.latency.shape import DENSE, SPARSE, ModelShape
from autoprune.latency.timing import CudaTimer
from autoprune.latency.whole_models import Step
from autoprune.latency.workload import Workload
from autoprune.models.layers import Inventory, inventory
from autoprune.models.task import output_layer
from autoprune.plugins import Plugins, load_plugins
from autoprune.policy import Layer
from autoprune.transfer import read_policy

PACKED = "packed"
"""The target whose folders still know how each layer is stored."""


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
        storages = _storages(place, dense, found, loaded)
        anatomy = Anatomy.of(
            dense.config, found, vocabulary=output_layer(dense).weight.shape[0]
        )
        compressed = deepcopy(dense)
        kernels = _replace_layers(compressed, storages, opened, work)
        plain = {layer: Storage.dense(layer) for layer in found.layers}
        shapes = anatomy.shape(storages), anatomy.shape(plain)
        proofs += _phases(opened, work, (compressed, dense), shapes, seconds)
    return Proven(
        opened.name, opened.basis, kernels, tuple(proofs), tuple(notes_on(opened))
    )


def _storages(
    folder: Path, model: nn.Module, found: Inventory, plugins: Plugins
) -> dict[Layer, Storage]:
    """Tell how each layer is stored; of plain folders only zeros can be seen."""
    if (folder / POLICY_FILE).exists() and read_marker(folder)["target"] == PACKED:
        actions, policy = Actions(plugins.methods), read_policy(folder / POLICY_FILE)
        per_layer = policy.per_layer(found.sites_for(policy))
        storages = {la: actions.storage(la, act) for la, act in per_layer.items()}
        # Loaded, what was cut is there again as zeros: it runs at its full size.
        return {
            la: Storage.dense(la) if one.units or not one.kept else one
            for la, one in storages.items()
        }
    dense = {layer: Storage.dense(layer) for layer in found.layers}
    for layer, storage in dense.items():
        module = _linear(model, layer)
        if module is not None and _is_two_of_four(module.weight):
            dense[layer] = storage.masked(storage.numel // 2, SPARSE)
    return dense


def _is_two_of_four(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


def _linear(model: nn.Module, layer: Layer) -> nn.Linear | None:
    """Give the linear module of a layer, if it is one."""
    try:
        module = model.get_submodule(layer.name)
    except AttributeError:  # an expert's slice of a larger parameter
        return None
    return module if isinstance(module, nn.Linear) else None


def _replace_layers(
    model: nn.Module, storages: Mapping[Layer, Storage], device: Device, work: Workload
) -> dict[str, int]:
    """Let each layer multiply by the kernel that was predicted for its prefill."""
    used: dict[str, int] = {}
    for layer, storage in storages.items():
        module, linears = _linear(model, layer), linears_of(layer, storage)
        if module is None or len(linears) != 1 or linears[0].format == DENSE:
            continue
        tokens = work.batch * work.prompt
        term = device.predictor.linear(linears[0], tokens, work.dtype)
        kernel = KERNELS[term.kernel]
        if kernel.format == DENSE or module.bias is not None:
            continue
        parent, _, name = layer.name.rpartition(".")
        fast = KernelLinear(kernel, module.weight.detach().float())
        setattr(model.get_submodule(parent), name, fast)
        used[kernel.name] = used.get(kernel.name, 0) + 1
    return used


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
