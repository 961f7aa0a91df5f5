"""Loads an export to run it: as it is, or on the kernels that gain on the device."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.compression.actions import Actions
from autoprune.compression.storage import Storage
from autoprune.evaluation.anatomy import linears_of
from autoprune.evaluation.timed import read_workloads
from autoprune.exporting import folder as folders
from autoprune.exporting.folder import POLICY_FILE
from autoprune.exporting.marker import MARKER, read_marker
from autoprune.latency.device import Device
from autoprune.latency.kernels import KERNELS
from autoprune.latency.model_running import KernelLinear
from autoprune.latency.opening import open_device
from autoprune.latency.shape import DENSE, SPARSE
from autoprune.latency.workload import Workload
from autoprune.models.layers import Inventory, inventory
from autoprune.plugins import Plugins, load_plugins
from autoprune.policy import Layer
from autoprune.policy_files import read_policy

PACKED = "packed"
"""The target whose folders still know how each layer is stored."""


def load(
    folder: str | Path,
    *,
    workload: str | None = None,
    device: str = "auto",
    plugins: Sequence[str] = (),
) -> Any:
    """Load an export as a transformers model, ready to run.

    A plain Hugging Face folder loads as well, as a causal language model. Without a
    workload every layer computes with its full weight, exactly as it was measured, on
    the processor. For a workload the model goes to the accelerator, if there is one,
    and layers multiply by the kernel of their format that gains there: 2:4 by torch's
    semi-structured kernels, codes by those for codes. What does not gain stays dense.

    Args:
        folder: What ``autoprune export`` has written.
        workload: Name of what the model will do: ``decode``, ``serve``, ``prefill``.
        device: Whose profile tells what gains: ``auto``, ``cpu``, or its folder.
        plugins: Modules to load beside the installed plugins.

    Raises:
        ExportError: If the folder is no export, or damaged.
        PluginError: If the plugin of its target is not there.
        ProfileError: If nothing is known of the device.
    """
    place = Path(folder)
    model: Any = folders.load(place, plugins=plugins)
    if workload is None:
        return model
    loaded = load_plugins(plugins)
    opened = open_device(device, loaded.objects["latency_backends"].values())
    (work,) = read_workloads([workload], opened)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(kind, getattr(torch, work.dtype))
    found = inventory(model, list(loaded.objects["architectures"].values()))
    use_kernels(model, storages_of(place, model, found, loaded), opened, work)
    return model


def storages_of(
    folder: Path, model: nn.Module, found: Inventory, plugins: Plugins
) -> dict[Layer, Storage]:
    """Tell how each layer is stored; of plain folders only zeros can be seen."""
    known = (folder / POLICY_FILE).exists() and (folder / MARKER).exists()
    if known and read_marker(folder)["target"] == PACKED:
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


def use_kernels(
    model: nn.Module, storages: Mapping[Layer, Storage], device: Device, work: Workload
) -> dict[str, int]:
    """Let each layer multiply by the kernel that was predicted for its prefill.

    Returns:
        How many layers use each kernel but the dense one.
    """
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
