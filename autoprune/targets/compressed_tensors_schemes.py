"""What of a variant compressed-tensors has a format for, and how large it is there.

Data only: the library itself is not needed to price a policy or to refuse one. Schemes
have the names of the library's presets, such as W4A16: weights of 4 bits, activations
of 16.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from typing import Any

from autoprune.compression.formats import INTEGERS
from autoprune.compression.storage import Part, Storage
from autoprune.policy import Layer

SERVED_BITS = (4, 8)
"""Bits of integers that all runtimes have kernels for."""

WIDER_BITS = (2, 3, 4, 5, 6, 7, 8)
"""Bits of integers that vLLM has kernels for."""

GROUPS = (32, 64, 128)
"""Weights that may share a scale: what Marlin, Machete and their like are built for."""

PACKED_INPUTS = 32
"""Inputs of packed integers come in multiples of this.

So many numbers fill whole words of 32 bits whatever their width, and vLLM's kernel for
CPUs takes no others.
"""

INSTALL = "compressed-tensors is not installed; pip install 'autoprune[export]'"

_INT_PACKED, _FLOAT8 = "pack-quantized", "float-quantized"
_INT8, _NVFP4 = "int-quantized", "nvfp4-pack-quantized"
_MXFP4 = "mxfp4-pack-quantized"

_ELSEWHERE = "Export as packed, which keeps it as it is, or take another action"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the layers of one config group are quantized.

    Attributes:
        name: As the library names its presets.
        format: How weights are stored.
        kind: ``int`` or ``float``.
        bits: Bits of a weight.
        strategy: Which weights share a scale, in the library's words.
        group: How many of a row do; None for a whole row or tensor.
        rounds_inputs: True if the activations are rounded to 8 bits as well, each token
            by its own largest value.
    """

    name: str
    format: str
    kind: str
    bits: int
    strategy: str
    group: int | None = None
    rounds_inputs: bool = False

    @property
    def inputs(self) -> int:
        """Inputs of a layer come in multiples of this."""
        if self.format == _INT_PACKED:
            return max(PACKED_INPUTS, self.group or 1)
        return self.group or 1

    @property
    def weights(self) -> dict[str, Any]:
        """Say the same in the library's words, but for types of torch."""
        named = {"num_bits": self.bits, "type": self.kind, "strategy": self.strategy}
        group = {} if self.group is None else {"group_size": self.group}
        return {**named, **group, "symmetric": True, "dynamic": False}

    @property
    def input_activations(self) -> dict[str, Any] | None:
        """Say how activations are rounded; None if they are not."""
        if not self.rounds_inputs:
            return None
        named = {"num_bits": 8, "type": self.kind, "strategy": "token"}
        return {**named, "symmetric": True, "dynamic": True}

    def parts(self, storage: Storage) -> dict[str, Part]:
        """Name what is stored of a layer, without the layer's own name."""
        rows, columns = storage.shape
        groups = columns // self.group if self.group else 1
        if self.format == _INT_PACKED:
            return {
                "weight_packed": Part("int32", (rows, ceil(columns * self.bits / 32))),
                "weight_scale": Part(storage.dtype, (rows, groups)),
                "weight_shape": Part("int64", (2,)),
            }
        if self.format == _MXFP4:
            return {
                "weight_packed": Part("uint8", (rows, columns // 2)),
                "weight_scale": Part("uint8", (rows, groups)),
            }
        if self.format == _NVFP4:
            return {
                "weight_packed": Part("uint8", (rows, columns // 2)),
                "weight_scale": Part("float8_e4m3fn", (rows, groups)),
                "weight_global_scale": Part("float32", (1,)),
            }
        codes = Part("int8" if self.kind == "int" else "float8_e4m3fn", storage.shape)
        scales = Part(storage.dtype, (rows, 1))
        if self.strategy == "tensor":
            scales = Part("float32", (1,))
        return {"weight": codes, "weight_scale": scales}


_CODES = {
    "fp8_e4m3": Scheme(
        "FP8_DYNAMIC", _FLOAT8, "float", 8, "channel", rounds_inputs=True
    ),
    "fp8_e4m3_tensor": Scheme(
        "FP8_DYNAMIC", _FLOAT8, "float", 8, "tensor", rounds_inputs=True
    ),
    "nvfp4": Scheme("NVFP4A16", _NVFP4, "float", 4, "tensor_group", 16),
    "mxfp4": Scheme("MXFP4A16", _MXFP4, "float", 4, "group", 32),
}
"""Schemes of code books, by the name of their format here."""

_NO_FORMAT = {
    "nf4": "compressed-tensors has no format for NF4; nvfp4 and rtn(bits=4) have one",
    "int_float_zero": "its zero points are not whole numbers, as those of hqq are not; "
    "rtn and gptq take whole ones",
    "int_tensor": "one scale for a whole matrix of integers is read in the layer's "
    "type, which would change every weight; rtn and int8_dynamic have one a row",
}
"""Why codes have no scheme, by the name of their format here."""


def scheme_of(storage: Storage) -> Scheme | None:
    """Tell how a layer so stored is quantized; None if it is written as values."""
    if storage.bits is None or storage.low_rank is not None or storage.channel_scales:
        return None
    if storage.code in _CODES:
        scheme = _CODES[storage.code]
        grouped = storage.group is not None and scheme.group is None
        return None if grouped else scheme
    if storage.code != INTEGERS or not storage.symmetric:
        return None
    bits, group = storage.bits, storage.group
    if bits == 8 and group is None:
        return Scheme("W8A8", _INT8, "int", 8, "channel", rounds_inputs=True)
    strategy = "channel" if group is None else "group"
    return Scheme(f"W{bits}A16", _INT_PACKED, "int", bits, strategy, group)


def refuse_quantized(layer: Layer, storage: Storage, *, everywhere: bool) -> str | None:
    """Say why codes cannot be written, or None if they can.

    Args:
        layer: The layer.
        storage: What it stores; with codes.
        everywhere: True if SGLang has to load them as well as vLLM.
    """
    if storage.low_rank is not None:
        return (
            f"codes with a product of low rank beside them have no format. {_ELSEWHERE}"
        )
    if storage.channel_scales:
        return (
            "codes are divided by a scale of each input, as awq and smoothquant leave "
            "them, which no format has and which is not folded into the layer before. "
            f"{_ELSEWHERE}, such as gptq"
        )
    if storage.code in _NO_FORMAT:
        return f"{_NO_FORMAT[storage.code]}. {_ELSEWHERE}"
    if not storage.symmetric:
        return (
            "transformers fails to load packed zero points (it expects them unpacked). "
            "Take symmetric=true, or export as packed"
        )
    if storage.code in ("nvfp4", "mxfp4") and storage.dtype != "bfloat16":
        return (
            f"transformers reads {storage.code} back as bfloat16 and cannot multiply "
            f"it with the rest of a model in {storage.dtype}. Start from the model in "
            "bfloat16, or export as packed"
        )
    scheme = scheme_of(storage)
    if scheme is None:
        return (
            f"runtimes know {storage.code} with one scale a row or tensor, found "
            f"groups of {storage.group}. Leave group out, or export as packed"
        )
    return _refuse_kernel(layer.shape[1], scheme, everywhere=everywhere)


def _refuse_kernel(columns: int, scheme: Scheme, *, everywhere: bool) -> str | None:
    """Say why no runtime has a kernel, or None if one has."""
    if everywhere and scheme.format == _MXFP4:
        return (
            "SGLang 0.5.23 has no MXFP4 for linear layers. Export as "
            "compressed-tensors-vllm, or take nvfp4"
        )
    if scheme.kind == "int" and scheme.format == _INT_PACKED:
        known = SERVED_BITS if everywhere else WIDER_BITS
        if scheme.bits not in known:
            other = "; compressed-tensors-vllm writes 2 to 8" if everywhere else ""
            return (
                f"runtimes have kernels for integers of {_list(known)} bits, found "
                f"{scheme.bits}{other}"
            )
        if scheme.group is not None and scheme.group not in GROUPS:
            return (
                f"runtimes have kernels for groups of {_list(GROUPS)} or a whole row, "
                f"found {scheme.group}"
            )
    return refuse_width(columns, scheme)


def refuse_width(columns: int, scheme: Scheme) -> str | None:
    """Say why a layer of so many inputs does not fit, or None if it does."""
    if columns % scheme.inputs == 0:
        return None
    return (
        f"its {columns} inputs are no multiple of {scheme.inputs}, as {scheme.name}"
        f"{f' in groups of {scheme.group}' if scheme.group else ''} needs"
    )


def refuse_missing() -> str | None:
    """Say that the library is not installed, or None if it is."""
    return None if find_spec("compressed_tensors") else INSTALL


def _list(numbers: tuple[int, ...]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}"
