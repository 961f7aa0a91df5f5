"""The targets ``compressed-tensors`` and ``compressed-tensors-vllm``: packed codes.

A Hugging Face folder whose quantized layers vLLM and SGLang run without unpacking them.
What both runtimes have kernels for was read in the sources of vLLM 0.33 and SGLang
0.5.23; what is written here is loaded and compared with transformers 5.23.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from autoprune.compression.storage import Part, Storage
from autoprune.errors import ExportError
from autoprune.exporting.cutting import Cutter
from autoprune.exporting.exporter import (
    CUT,
    EXACT,
    Bounds,
    Digests,
    Exporter,
    ExportJob,
)
from autoprune.exporting.marker import read_marker, write_marker
from autoprune.exporting.weight_files import header_bytes
from autoprune.hookspecs import hookimpl
from autoprune.models.checkpoints import load_model
from autoprune.models.layers import Inventory
from autoprune.models.weights import dtype_name, expert_of
from autoprune.policy import Layer
from autoprune.targets.compressed_tensors_layout import Layouts
from autoprune.targets.compressed_tensors_notes import notes_of
from autoprune.targets.compressed_tensors_schemes import (
    Scheme,
    refuse_missing,
    refuse_quantized,
    refuse_width,
    scheme_of,
)

INT8 = Bounds(0.15, None, "activations are rounded to integers of 8 bits")
"""Measured on SmolLM2-135M in bfloat16, all layers: 0.055."""

FP8 = Bounds(0.05, None, "activations are rounded to floats of 8 bits")
"""Measured on SmolLM2-135M in bfloat16, all layers: 0.002 a row, 0.010 a tensor."""

NVFP4 = Bounds(5e-3, 1.0, "the scale of a matrix is stored as what to divide by")
"""Measured on SmolLM2-135M in bfloat16: 0.0008; one weight in 500 is rounded apart."""

_OFFSETS = 22
"""Digits by which two offsets in a header may be longer than they are there."""


class CompressedTensors(Exporter):
    """Codes and scales as the variants hold them, in the library's own packing.

    Zeros of a mask are codes that mean zero, and cost what any code costs. Layers
    without codes are written as values. Whole blocks that are dropped are left out, and
    channels and heads of which every block keeps equally many, as in plain folders.

    Args:
        model: The dense model, if one is known.
        inventory: Its layers.

    Attributes:
        everywhere: True if SGLang has to load what is written as well as vLLM.
    """

    name = "compressed-tensors"
    stores = "codes and scales packed for kernels; zeros and values at full size"
    loads_in = "vLLM and SGLang (by their sources), transformers (tested)"
    fuses = True
    everywhere: ClassVar[bool] = True

    def __init__(self, model: Any = None, inventory: Inventory | None = None) -> None:
        self._cutter: Cutter | None = None
        self._linear: frozenset[str] | None = None
        self._layers: tuple[Layer, ...] = ()
        if model is None or inventory is None:
            return
        self._cutter = Cutter(model, inventory)
        self._layers = inventory.layers
        self._linear = frozenset(
            name for name, one in model.named_modules() if isinstance(one, nn.Linear)
        )
        self._layouts = Layouts(self._cutter, inventory, self._scheme)

    def for_model(self, model: Any, inventory: Inventory) -> "CompressedTensors":
        """Find out how the model is saved, and what can be left out of it."""
        return type(self)(model, inventory)

    def refuses(self, layer: Layer, storage: Storage) -> str | None:
        """Say why no runtime would load a layer so stored, or None."""
        if reason := refuse_missing() or super().refuses(layer, storage):
            return reason
        if storage.bias and self._cutter is not None:
            if reason := self._cutter.switches.refuses(layer):
                return reason
        if storage.bits is None:
            return None
        if reason := self._refuse_place(layer):
            return reason
        return refuse_quantized(layer, storage, everywhere=self.everywhere)

    def refuses_policy(
        self, storages: Mapping[Layer, Storage], inventory: Inventory
    ) -> str | None:
        """Say why layers that are fused differ, or a cut parts what shares a scale."""
        if reason := refuse_missing() or super().refuses_policy(storages, inventory):
            return reason
        if self._cutter is None:
            return None
        remains = self._cutter.decide(storages)[0]
        units = dict(remains.units)
        for layer, storage in storages.items():
            scheme, cut = self._scheme(layer, storage), layer.cut
            if scheme is None or cut is None or cut.kind not in units:
                continue
            if layer.block not in remains.blocks or cut.axis == "rows":
                continue
            group, left = scheme.group, units[cut.kind] * cut.unit
            if group is not None and cut.unit % group:
                return (
                    f"removing {cut.kind} cuts the columns of {layer.name}, of which "
                    f"{group} in a row share a scale. Quantize it with one scale a "
                    "row, or export as packed"
                )
            if reason := refuse_width(left, scheme):
                return f"{layer.name}, cut to {left} inputs, does not fit: {reason}"
        return None

    def bounds(self, storages: Mapping[Layer, Storage]) -> Bounds:
        """Tell how far rounded activations, or a cut, move the model."""
        found = {self._scheme(layer, one) for layer, one in storages.items()}
        schemes = [scheme for scheme in found if scheme is not None]
        if rounded := {one.kind for one in schemes if one.rounds_inputs}:
            return INT8 if "int" in rounded else FP8
        if any(scheme.strategy == "tensor_group" for scheme in schemes):
            return NVFP4
        cutter = self._cutter
        if cutter is not None and cutter.decide(storages)[0] != cutter.whole:
            return CUT
        return EXACT

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name what is written of a layer; an expert as if it were alone."""
        expert = expert_of(layer.name)
        stem = f"{expert[0]}.{expert[2]}.{expert[1]}" if expert else layer.name
        scheme = self._scheme(layer, storage)
        parts = {"weight": Part(storage.dtype, storage.shape)}
        if scheme is not None:
            parts = scheme.parts(storage)
        if storage.bias:
            parts["bias"] = Part(storage.dtype, (storage.shape[0],))
        return {f"{stem}.{key}": part for key, part in parts.items()}

    def metadata(self) -> dict[str, str]:
        """Say that the tensors are torch's."""
        return {"format": "pt"}

    def layer_bytes(self, layer: Layer, storage: Storage) -> int:
        """Price a layer by what it adds to the file of a model without its weight."""
        price = super().layer_bytes(layer, storage)
        if self._cutter is None:
            return price
        if storage.bias:
            switches = self._cutter.switches
            added = switches.added(switches.needed([layer]))
            parts = {n: Part(dtype_name(t), tuple(t.shape)) for n, t in added.items()}
            price += sum(p.nbytes + header_bytes(n, p) for n, p in parts.items())
        (dense,) = self.tensors(layer, Storage.dense(layer)).items()
        return price - max(0, header_bytes(*dense) - _OFFSETS)

    def size_bytes(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> int:
        """Tell the size of the weight files; of parts, with the others at no bytes."""
        absent = [layer for layer in self._layers if layer not in storages]
        whole = {**storages, **{layer: Storage.dense(layer) for layer in absent}}
        less = sum(whole[layer].nbytes for layer in absent)
        return super().size_bytes(whole, untouched) - less

    def declared(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> dict[str, Part]:
        """Name every tensor in the order in which it is written."""
        if self._cutter is None:
            return super().declared(storages, untouched)
        return dict(self._layouts.of(storages).parts)

    def usage(self, folder: str, auto_class: str) -> str:
        """Give the commands that serve it."""
        sglang = f"\npython -m sglang.launch_server --model-path {folder}"
        return f"vllm serve {folder}{sglang if self.everywhere else ''}"

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell what is quantized how, what runtimes add, and what stays zeros."""
        schemes = {layer: self._scheme(layer, one) for layer, one in storages.items()}
        cut = self._cutter.decide(storages)[1] if self._cutter else []
        return [*cut, *notes_of(schemes, storages, everywhere=self.everywhere)]

    def write(self, folder: Path, job: ExportJob) -> Digests:
        """Write the model layer by layer.

        Raises:
            ExportError: If a layer cannot be held, or codes would not survive.
        """
        model = load_model(job.checkpoint, job.auto_class)
        exporter = self.for_model(model, job.inventory) if not self._cutter else self
        assert exporter._cutter is not None
        for layer, storage in job.storages.items():
            if reason := exporter.refuses(layer, storage):
                raise ExportError(
                    f"the target {self.name!r} cannot hold {layer.name}: {reason}"
                )
        from autoprune.targets.compressed_tensors_writing import write_model

        digests = write_model(
            folder,
            model,
            job,
            cutter=exporter._cutter,
            layout=exporter._layouts.of(job.storages),
            limit=self.shard_bytes,
        )
        write_marker(
            folder,
            target=self.name,
            auto_class=job.auto_class,
            dtype=dtype_name(next(model.parameters())),
        )
        return digests

    def load(self, folder: Path) -> PreTrainedModel:
        """Read the model with transformers, its weights dense again.

        Raises:
            ExportError: If a file is missing, damaged, newer or of another target, or
                the library is not installed.
        """
        needs = {"auto_class": str, "dtype": str}
        marker = read_marker(folder, target=self.name, needs=needs)
        if reason := refuse_missing():
            raise ExportError(f"cannot load the export {folder}: {reason}")
        from autoprune.targets import compressed_tensors_loading

        return compressed_tensors_loading.load_model(
            folder, auto_class=marker["auto_class"], dtype=marker["dtype"]
        )

    def _scheme(self, layer: Layer, storage: Storage) -> Scheme | None:
        """Tell how a layer is quantized; None if it is written as values."""
        return None if self._refuse_place(layer) else scheme_of(storage)

    def _refuse_place(self, layer: Layer) -> str | None:
        """Say why a layer is none that can be quantized, or None."""
        if expert_of(layer.name):
            return (
                "transformers has all experts in one parameter, and reads no quantized "
                "ones by default. Leave them dense, or export as packed"
            )
        if self._linear is None:
            return None
        if self._layouts.splits_experts:
            return (
                "transformers 5.23 fails to load a model that has any quantized layer "
                "and its experts one by one. Export as packed"
            )
        if layer.name in self._linear:
            return None
        return (
            "only linear layers can be quantized: transformers fails to load a "
            "quantized embedding, and knows no quantized Conv1D. Leave it dense, or "
            "export as packed"
        )


class CompressedTensorsVllm(CompressedTensors):
    """The same with what only vLLM runs: integers of 2 to 8 bits, and MXFP4."""

    name = "compressed-tensors-vllm"
    stores = "as compressed-tensors, also integers of 2, 3, 5, 6 and 7 bits and MXFP4"
    loads_in = "vLLM (by its sources), transformers (tested)"
    everywhere = False


@hookimpl
def register_exporters() -> list[Exporter]:
    """Register both."""
    return [CompressedTensors(), CompressedTensorsVllm()]
