"""Codes and scales of variants as the blocks of GGUF, and what a reader makes of them.

A block is 32 weights of a row. ``Q4_0``, ``Q5_0`` and ``Q8_0`` hold whole numbers and
a scale in float16; ``Q4_1`` and ``Q5_1`` codes from 0 on, a scale and a minimum;
``MXFP4`` codes of E2M1 and a power of two. A group of more than 32 weights becomes
several blocks with one scale, so that a variant's own codes are written and nothing is
rounded anew.

Exact are scales that float16 holds, as all of a float16 model are, and those of a
bfloat16 model from 2^-17 on (below, float16 loses bits; a step is off by 2^-25 at
most). A minimum is minus a zero point times the scale, which needs more bits. A block
read backwards, with minus its scale and codes counted from above, has ``15 - zero`` in
the place of ``zero``: the smaller of both is at most 7, and 7 times the 8 bits of a
bfloat16 scale fit the 11 of float16. So 4 bits with zero points are exact in a bfloat16
model. 5 bits there, 4 bits in float16, and zero points that are no whole numbers are
rounded: by at most 2^-11 of the minimum, which is under a hundredth of a step. So are
scales in float32: those of a float32 model, and the one of a whole tensor.
"""

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from autoprune.compression.formats import FORMATS
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant

Kind = GGMLQuantizationType

BLOCK = 32
"""Weights of a block."""

VALUES = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16}
"""Types that hold the values of a layer's type exactly."""

_NUMBERS = {Kind.Q4_0: 8, Kind.Q5_0: 16, Kind.Q8_0: 128}
"""Types of whole numbers, the smallest first: from minus so much, to one less."""

_MINIMA = {4: Kind.Q4_1, 5: Kind.Q5_1}
"""Types with a minimum, by the bits of a code."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A tensor as it is written.

    Attributes:
        kind: Its type in GGUF.
        data: Its bytes, row by row.
        told: What a reader makes of them: of codes in float32, of values in their type.
    """

    kind: Kind
    data: NDArray[np.uint8]
    told: Float[Tensor, "*shape"]


def kind_of(storage: Storage) -> Kind | None:
    """Choose the type for a layer so stored; None where none holds its codes."""
    if storage.bits is None:
        return VALUES.get(storage.dtype)
    form, bits, masked = FORMATS[storage.code], storage.bits, storage.mask is not None
    if form.values:
        return Kind.MXFP4 if storage.code == "mxfp4" else None
    if form.float_zeros:
        return None if masked else _MINIMA.get(max(bits, 4))
    # Three bits with zero points are whole numbers from -7 to 7, which need no minimum.
    # Nor do removed weights allow one: what is removed has to be exactly zero.
    if not storage.symmetric and bits > 3 and not masked and bits in _MINIMA:
        return _MINIMA[bits]
    span = 1 << (bits - 1) if storage.symmetric else (1 << bits) - 1
    return next((kind for kind, end in _NUMBERS.items() if span <= end), None)


def is_rounded(storage: Storage) -> bool:
    """Tell whether scales or minima are rounded, but for very small ones; see above."""
    kind = kind_of(storage)
    if storage.bits is None or kind is Kind.MXFP4:
        return False
    if FORMATS[storage.code].tensor_scale or storage.dtype == "float32":
        return True
    exact = storage.dtype == "bfloat16" and not FORMATS[storage.code].float_zeros
    return kind is Kind.Q5_1 or (kind is Kind.Q4_1 and not exact)


def row_bytes(kind: Kind, columns: int) -> int:
    """Count the bytes of a row."""
    weights, size = GGML_QUANT_SIZES[kind]
    assert columns % weights == 0, f"{columns} columns are no blocks of {kind.name}"
    return columns // weights * size


def values(tensor: Float[Tensor, "*shape"], kind: Kind) -> Blocks:
    """Write plain values in a type that holds them.

    Args:
        tensor: Of any float type.
        kind: ``F32``, ``F16`` or ``BF16``.
    """
    dtype = getattr(torch, next(name for name, one in VALUES.items() if one is kind))
    plain = tensor.to(dtype).contiguous()
    return Blocks(kind, plain.view(torch.uint8).numpy(), plain)


def blocks(
    variant: Variant, rows: Int[Tensor, " rows"], columns: Int[Tensor, " columns"]
) -> Blocks:
    """Write a variant, or the rows and columns of it that stay.

    Args:
        variant: Of a storage that ``kind_of`` knows a type for.
        rows: Which rows, in which order.
        columns: Which columns; those of a block have to share a scale.
    """
    storage, kind = variant.storage, kind_of(variant.storage)
    assert kind is not None, storage
    if storage.bits is None:
        assert variant.values is not None
        return values(chosen(variant.values, rows, columns), kind)
    assert variant.codes is not None
    whole = (len(rows), len(columns) // BLOCK, BLOCK)
    codes = chosen(variant.codes, rows, columns).numpy().reshape(whole)
    kept = None
    if variant.mask is not None:
        kept = chosen(variant.mask, rows, columns).numpy().reshape(whole)
    group = storage.group or storage.shape[1]
    places = columns[::BLOCK] // group
    scales = _per_block(variant.scales, rows, places)
    if kind is Kind.MXFP4:
        assert scales is not None
        return _mxfp4(codes if kept is None else np.where(kept, codes, 0), scales)
    if variant.tensor_scale is not None:
        one = np.float32(variant.tensor_scale.item())
        scales = np.full(whole[:2], one) if scales is None else scales * one
    assert scales is not None
    zeros = _per_block(variant.zeros, rows, places)
    if zeros is None:
        zeros = np.full(whole[:2], 1 << (storage.bits - 1), np.float32)
    if kind in _MINIMA.values():
        return _with_minimum(codes, scales, zeros, kind=kind)
    numbers = codes.astype(np.int16) - zeros[..., None].astype(np.int16)
    if kept is not None:
        numbers = np.where(kept, numbers, 0)
    return _whole_numbers(numbers, scales, kind=kind)


def chosen(
    tensor: Tensor, rows: Int[Tensor, " rows"], columns: Int[Tensor, " columns"]
) -> Tensor:
    """Take rows and columns; the tensor itself if all stay where they are."""
    for axis, lines in enumerate((rows, columns)):
        if not torch.equal(lines, torch.arange(tensor.shape[axis])):
            tensor = tensor.index_select(axis, lines)
    return tensor


def _per_block(
    told: Tensor | None, rows: Int[Tensor, " rows"], places: Int[Tensor, " blocks"]
) -> NDArray[np.float32] | None:
    """Repeat what a group has for each of its blocks."""
    if told is None:
        return None
    found: NDArray[np.float32] = told[rows][:, places].float().numpy()
    return found


# A scale too large for float16 becomes infinite, and what is told of it no number:
# whoever compares that with the weights finds out.
_unwarned = np.errstate(over="ignore", invalid="ignore")


@_unwarned
def _whole_numbers(
    numbers: NDArray[np.int16], scales: NDArray[np.float32], *, kind: Kind
) -> Blocks:
    """Write ``number * scale``."""
    halves = scales.astype(np.float16)
    told = halves.astype(np.float32)[..., None] * numbers.astype(np.float32)
    if kind is Kind.Q8_0:
        body = numbers.astype(np.int8).view(np.uint8)
    else:
        body = _nibbles((numbers + _NUMBERS[kind]).astype(np.uint8), kind)
    return _joined(kind, told, [_bytes(halves), body])


@_unwarned
def _with_minimum(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32],
    *,
    kind: Kind,
) -> Blocks:
    """Write ``code * scale + minimum``, forwards or backwards; see above."""
    top = np.float32(15 if kind is Kind.Q4_1 else 31)
    back = np.abs(top - zeros) < np.abs(zeros)
    steps = np.where(back, -scales, scales)
    minima = np.where(back, top - zeros, -zeros) * scales
    written = np.where(back[..., None], top.astype(np.uint8) - codes, codes)
    step, minimum = steps.astype(np.float16), minima.astype(np.float16)
    told = step.astype(np.float32)[..., None] * written.astype(np.float32)
    told = told + minimum.astype(np.float32)[..., None]
    return _joined(kind, told, [_bytes(step), _bytes(minimum), _nibbles(written, kind)])


def _mxfp4(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> Blocks:
    """Write codes of E2M1, which GGUF numbers alike, and exponents of two."""
    exponents = torch.from_numpy(scales).to(torch.float8_e8m0fnu).view(torch.uint8)
    meanings = np.array(FORMATS["mxfp4"].values, np.float32)
    told = meanings[codes] * scales[..., None]
    body = _nibbles(codes, Kind.MXFP4)
    return _joined(Kind.MXFP4, told, [exponents.numpy()[..., None], body])


def _nibbles(codes: NDArray[np.uint8], kind: Kind) -> NDArray[np.uint8]:
    """Pack four bits a weight, the second half of a block above; a fifth bit before."""
    low, high = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
    packed = ((low & 15) | ((high & 15) << 4)).astype(np.uint8)
    if kind not in (Kind.Q5_0, Kind.Q5_1):
        return packed
    fifth = np.packbits(codes >> 4, axis=-1, bitorder="little")
    return np.concatenate([fifth, packed], axis=-1)


def _bytes(halves: NDArray[np.float16]) -> NDArray[np.uint8]:
    return halves.astype("<f2")[..., None].view(np.uint8)


def _joined(
    kind: Kind, told: NDArray[np.float32], parts: list[NDArray[np.uint8]]
) -> Blocks:
    rows = len(told)
    data = np.concatenate(parts, axis=-1).reshape(rows, -1)
    return Blocks(kind, data, torch.from_numpy(told.reshape(rows, -1)))
