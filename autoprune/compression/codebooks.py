"""Code books: weights as the nearest of a few floats, with scales that fit them."""

from dataclasses import dataclass
from math import frexp

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from autoprune.compression.formats import FORMATS, Format
from autoprune.compression.grids import round_up

BYTE_TYPES = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
"""Types of scales that take one byte."""

_LEAST_E4M3 = 2.0**-9
"""Smallest scale in E4M3 that is not zero."""


@dataclass(frozen=True, eq=False)
class Coded:
    """Weights as codes of a code book.

    Attributes:
        codes: Codes.
        scales: Scale of each row and group; None where only the tensor has one.
        tensor_scale: Scale of the whole tensor; None if there is none.
    """

    codes: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"] | None
    tensor_scale: Float[Tensor, " 1"] | None


def encode(
    weight: Float[Tensor, "out in"], name: str, *, group: int | None, dtype: torch.dtype
) -> Coded:
    """Round weights to the nearest numbers of a format, scaled to their group's size.

    Scales are rounded as they are stored before any code is chosen.

    Args:
        weight: Finite weights, in float32.
        name: A format with a code book.
        group: Weights of a row that share a scale; None for the whole row.
        dtype: Type of the layer.
    """
    form = FORMATS[name]
    grouped = weight.reshape(len(weight), -1, group or weight.shape[1])
    largest = grouped.abs().amax(2)
    scales, tensor_scale = _fit(largest, form, dtype)
    step = torch.ones_like(largest) if scales is None else scales
    if tensor_scale is not None:
        step = step * tensor_scale
    codes = nearest(grouped / step[..., None], form).view(weight.shape)
    return Coded(codes, scales, tensor_scale)


def nearest(numbers: Float[Tensor, "*shape"], form: Format) -> UInt8[Tensor, "*shape"]:
    """Give the code of the nearest number; even codes on ties, ends beyond the ends.

    Zero is always the code of ``+0.0``, also for small negative numbers.
    """
    levels = torch.tensor(form.levels, dtype=torch.float32)
    between = (levels[1:] + levels[:-1]) / 2
    sizes = (numbers.abs() if form.signed else numbers).contiguous()
    codes = torch.bucketize(sizes, between, out_int32=True)
    above = torch.bucketize(sizes, between, out_int32=True, right=True)
    codes = torch.where(codes % 2 == 0, codes, above)  # they differ on ties only
    if form.signed:
        codes = codes + (len(form.values) // 2) * ((numbers < 0) & (codes > 0))
    return codes.to(torch.uint8)


def decode(codes: UInt8[Tensor, "*shape"], form: Format) -> Float[Tensor, "*shape"]:
    """Look up what codes mean, before scales."""
    levels = torch.tensor(form.values, dtype=torch.float32)
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


def scales_to_bytes(
    scales: Float[Tensor, "out groups"], kind: str
) -> UInt8[Tensor, "out groups"]:
    """Write scales as bytes of ``e8m0`` or ``e4m3``."""
    return scales.to(BYTE_TYPES[kind]).view(torch.uint8)


def scales_from_bytes(
    stored: UInt8[Tensor, "out groups"], kind: str
) -> Float[Tensor, "out groups"]:
    """Read scales that ``scales_to_bytes`` wrote, in float32."""
    return stored.view(BYTE_TYPES[kind]).float()


def _fit(
    largest: Float[Tensor, "out groups"], form: Format, dtype: torch.dtype
) -> tuple[Float[Tensor, "out groups"] | None, Float[Tensor, " 1"] | None]:
    """Fit scales to the largest weight of each group; any scale does for zeros."""
    if form.scales == "e8m0":  # the exponents of both numbers become equal
        exponents = torch.frexp(largest).exponent - frexp(form.top)[1]
        scales = torch.ldexp(torch.ones_like(largest), exponents.clamp(-127, 127))
        return scales, None
    whole = largest.max().view(1)
    if form.scales == "none":
        return None, _or_one(whole / form.top)
    if form.scales == "e4m3":
        most = torch.finfo(torch.float8_e4m3fn).max
        tensor_scale = _or_one(whole / (form.top * most))
        scales = (largest / form.top / tensor_scale).clamp(_LEAST_E4M3, most)
        return scales.to(torch.float8_e4m3fn).float(), tensor_scale
    return round_up(largest / form.top, dtype), None


def _or_one(scale: Float[Tensor, " 1"]) -> Float[Tensor, " 1"]:
    """Replace a scale of zero, which is all that zeros or tiny weights leave."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
