"""Hands a variant's codes to compressed-tensors, whose own code packs them.

The library wants weights and rounds them itself. It gets them in float32, each the
product of what a code means and its scale. A code has at most 8 significant bits and a
scale in half precision 11, so the product is exact, and dividing it by the scale gives
the code again. All the same, what was packed is unpacked and compared.
"""

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.codebooks import decode, scales_to_bytes
from autoprune.compression.formats import FORMATS
from autoprune.compression.storage import BITMAP
from autoprune.compression.variant import Variant
from autoprune.errors import ExportError
from autoprune.exporting.shrinking import Units
from autoprune.policy import Layer
from autoprune.targets.compressed_tensors_schemes import Scheme

_BYTE_SCALES = {"nvfp4-pack-quantized": "e4m3", "mxfp4-pack-quantized": "e8m0"}
"""What the bytes of scales are, by format."""

_BYTE_TYPES = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}
"""Types that the library stores them in."""


def library_scheme(scheme: Scheme, targets: list[str]) -> QuantizationScheme:
    """Say a scheme in the library's own type.

    Args:
        scheme: The scheme.
        targets: Names of the modules that have it.
    """
    types: dict[str, Any] = {}
    if kind := _BYTE_SCALES.get(scheme.format):
        types = {"scale_dtype": _BYTE_TYPES[kind], "zp_dtype": _BYTE_TYPES[kind]}
    inputs = scheme.input_activations
    return QuantizationScheme(
        targets=targets,
        weights=QuantizationArgs(**scheme.weights, **types),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
        format=scheme.format,
    )


def packed(variant: Variant, scheme: Scheme, name: str) -> dict[str, Tensor]:
    """Give the tensors that are stored of a quantized variant, without its name.

    Args:
        variant: The variant, cut if need be.
        scheme: Its scheme.
        name: Its layer's, for the error.

    Raises:
        ExportError: If the library has packed other codes or scales.
    """
    numbers = code_numbers(variant)
    scales = _scales(variant)
    weight = numbers.view(*numbers.shape[:1], variant.storage.groups, -1)
    if variant.scales is not None:
        weight = weight * variant.scales[..., None].float()
    if variant.tensor_scale is not None:
        weight = weight * variant.tensor_scale
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    given = {"weight": weight.view(numbers.shape), **scales}
    made = dict(compressor.compress(given, library_scheme(scheme, [])))
    wrong = int((_unpacked(made, scheme, numbers.shape) != numbers).sum())
    if scheme.format in _BYTE_SCALES:
        kind, read = _BYTE_SCALES[scheme.format], made["weight_scale"].view(torch.uint8)
        wrong += int((read != scales_to_bytes(scales["weight_scale"], kind)).sum())
    elif variant.scales is not None:
        made["weight_scale"] = variant.scales.contiguous()  # in float32 so far
    if wrong:
        raise ExportError(
            f"compressed-tensors {version('compressed-tensors')} has changed {wrong} "
            f"codes or scales of {name}. Install the version that constraints.txt names"
        )
    return made


def code_numbers(variant: Variant) -> Float[Tensor, "out in"]:
    """Tell what codes mean before any scale; zero where pruned."""
    storage = variant.storage
    assert variant.codes is not None and storage.bits is not None
    form = FORMATS[storage.code]
    if form.values:
        numbers = decode(variant.codes, form)
    else:
        numbers = variant.codes.float() - (1 << (storage.bits - 1))
    return numbers if variant.mask is None else numbers.where(variant.mask, 0.0)


def read_back(variant: Variant, scheme: Scheme) -> Float[Tensor, "out in"]:
    """Tell the weight that transformers gives back, in the layer's type.

    It is the variant's own but for two formats. transformers rounds the scale of a
    whole tensor to the layer's type. NVFP4 has the tensor's scale as what to divide by,
    so that numbers may differ in the last bit of float32 before they are rounded.
    """
    dtype = getattr(torch, variant.storage.dtype)
    if variant.tensor_scale is None:
        return variant.weight
    numbers = code_numbers(variant)
    if variant.scales is None:
        return numbers.to(dtype) * variant.tensor_scale.to(dtype)
    step = (variant.scales.float() / variant.tensor_scale.reciprocal())[..., None]
    return (numbers.view(*step.shape[:2], -1) * step).view(numbers.shape).to(dtype)


def cut_codes(variant: Variant, layer: Layer, units: Units) -> Variant:
    """Give a quantized variant with only some units of a structure left.

    Args:
        variant: The variant.
        layer: Its layer; one that is cut.
        units: The units that stay.

    Raises:
        ExportError: If weights that share a scale would not stay together.
    """
    cut, storage = layer.cut, variant.storage
    assert cut is not None and variant.codes is not None, layer.name
    lines = (units[:, None] * cut.unit + torch.arange(cut.unit)).flatten()
    axis = 0 if cut.axis == "rows" else 1
    codes = variant.codes.index_select(axis, lines)
    mask, scales = variant.mask, variant.scales
    if scales is not None and axis == 0:
        scales = scales[lines]
    elif scales is not None and storage.group is not None:
        scales = scales[:, _whole_groups(lines, storage.group, layer)]
    mask = None if mask is None else mask.index_select(axis, lines)
    rows, columns = codes.shape
    kept = codes.numel() if mask is None else int(mask.sum())
    small = replace(storage, shape=(rows, columns), kept=kept)
    if mask is not None:  # N:M may no longer hold
        small = replace(small, mask=BITMAP, units=None)
    return replace(variant, storage=small, codes=codes, scales=scales, mask=mask)


def _whole_groups(lines: Tensor, group: int, layer: Layer) -> Tensor:
    """Tell the groups that columns are of, which have to stay whole."""
    whole = len(lines) % group == 0
    groups = lines.view(-1, group) // group if whole else lines[:0].view(0, 1)
    if not whole or bool((groups != groups[:, :1]).any()):
        raise ExportError(
            f"the columns of {layer.name} that stay are no whole groups of {group}, "
            "which share a scale. Take codes with one scale a row"
        )
    return groups[:, 0]


def _scales(variant: Variant) -> dict[str, Tensor]:
    """Name the scales as the library does, in float32."""
    tensor = variant.tensor_scale
    if variant.scales is None:
        assert tensor is not None
        return {"weight_scale": tensor}
    scales = {"weight_scale": variant.scales.float().contiguous()}
    if tensor is not None:
        scales["weight_global_scale"] = tensor.reciprocal()
    return scales


def _unpacked(
    made: dict[str, Tensor], scheme: Scheme, shape: torch.Size
) -> Float[Tensor, "out in"]:
    """Read codes back, as the numbers that they mean before any scale."""
    read: Tensor
    if scheme.format in _BYTE_SCALES:
        read = unpack_fp4_from_uint8(made["weight_packed"], *shape)
    elif "weight_packed" in made:
        read = unpack_from_int32(made["weight_packed"], scheme.bits, shape)
    else:
        read = made["weight"]
    return read.float()
