"""A variant: one layer under one action, its numbers as they will be stored."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from autoprune.compression.storage import BITMAP, Storage, packed_bytes


@dataclass(frozen=True, eq=False)
class Variant:
    """One layer under one action, unpacked.

    Attributes:
        storage: What it stores when packed.
        values: Unquantized weights, ``+0.0`` where pruned; None when quantized.
        codes: Codes, 0 where pruned; None without quantization.
        scales: Step of each row and group, in the layer's type.
        zeros: Code that means zero, per row and group; None when symmetric.
        mask: True where a weight is kept; None if all are.
    """

    storage: Storage
    values: Float[Tensor, "out in"] | None = None
    codes: UInt8[Tensor, "out in"] | None = None
    scales: Float[Tensor, "out groups"] | None = None
    zeros: UInt8[Tensor, "out groups"] | None = None
    mask: Bool[Tensor, "out in"] | None = None

    @classmethod
    def dense(cls, weight: Float[Tensor, "out in"]) -> Self:
        """Wrap an untouched weight."""
        rows, columns = weight.shape
        name = str(weight.dtype).removeprefix("torch.")
        return cls(Storage((rows, columns), name, weight.numel()), values=weight)

    def pruned(
        self,
        weight: Float[Tensor, "out in"],
        kept: Bool[Tensor, "out in"],
        *,
        pattern: str | None = None,
    ) -> "Variant":
        """Give the variant with a new weight, stored only where ``kept`` is True.

        Args:
            weight: Unquantized weight, in any float type; rounded to the layer's type.
            kept: True where a weight stays.
            pattern: The ``N:M`` pattern that ``kept`` follows; None for any other.
        """
        dtype = getattr(torch, self.storage.dtype)
        values = torch.where(kept, weight.to(dtype), torch.zeros((), dtype=dtype))
        storage = self.storage.masked(int(kept.sum()), pattern or BITMAP)
        return Variant(storage, values=values, mask=kept)

    def quantized(
        self,
        codes: UInt8[Tensor, "out in"],
        scales: Float[Tensor, "out groups"],
        zeros: UInt8[Tensor, "out groups"] | None,
        *,
        bits: int,
        group: int | None,
    ) -> "Variant":
        """Give the variant with codes in the place of values; the mask stays.

        A weight is ``(code - zero) * scale``; ``zero`` is ``2**(bits - 1)`` when
        ``zeros`` is None.
        """
        storage = self.storage.quantized(bits, group, zeros is None)
        if self.mask is not None:
            codes = codes * self.mask
        dtype = getattr(torch, self.storage.dtype)
        return replace(
            self,
            storage=storage,
            values=None,
            codes=codes,
            scales=scales.to(dtype),
            zeros=zeros,
        )

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight that the model computes with, in the layer's type."""
        if self.values is not None:
            return self.values
        assert self.codes is not None and self.scales is not None
        assert self.storage.bits is not None
        rows, columns = self.storage.shape
        groups = self.scales.shape[1]
        codes = self.codes.view(rows, groups, columns // groups).float()
        if self.zeros is None:
            codes = codes - 2 ** (self.storage.bits - 1)
        else:
            codes = codes - self.zeros[..., None].float()
        weight = (codes * self.scales[..., None].float()).view(rows, columns)
        if self.mask is not None:
            weight = torch.where(self.mask, weight, 0.0)
        return weight.to(self.scales.dtype)

    def pack(self) -> dict[str, Tensor]:
        """Give the tensors that are stored, as ``storage.parts`` declares them."""
        storage, parts = self.storage, {}
        if self.values is not None:
            parts["values"] = _take(self.values, self.mask)
        else:
            assert self.codes is not None and self.scales is not None
            assert storage.bits is not None
            parts["codes"] = pack_bits(
                _take(self.codes, self.mask).flatten(), storage.bits
            )
            parts["scales"] = self.scales.contiguous()
            if self.zeros is not None:
                parts["zeros"] = pack_bits(self.zeros.flatten(), storage.bits)
        if self.mask is not None:
            parts["mask"] = _pack_mask(self.mask, storage)
        return parts

    @classmethod
    def unpack(cls, storage: Storage, parts: Mapping[str, Tensor]) -> Self:
        """Read a variant from its stored tensors."""
        shape, dtype = storage.shape, getattr(torch, storage.dtype)
        mask = _unpack_mask(parts["mask"], storage) if storage.mask else None
        if storage.bits is None:
            values = parts["values"].view(dtype)
            return cls(storage, values=_scatter(values, mask, shape), mask=mask)
        codes = unpack_bits(parts["codes"], storage.bits, storage.kept)
        zeros = None
        if not storage.symmetric:
            count = shape[0] * storage.groups
            zeros = unpack_bits(parts["zeros"], storage.bits, count)
            zeros = zeros.view(shape[0], storage.groups)
        return cls(
            storage,
            codes=_scatter(codes, mask, shape),
            scales=parts["scales"].view(dtype),
            zeros=zeros,
            mask=mask,
        )


def pack_bits(numbers: UInt8[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Pack small numbers without gaps, least significant bit first.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
        [33, 3]
    """
    words = np.zeros((numbers.numel() + 7) // 8 * 8, dtype="<u8")
    words[: numbers.numel()] = numbers.numpy()
    shifts = np.arange(8, dtype="<u8") * np.uint64(bits)
    packed = (words.reshape(-1, 8) << shifts).sum(1, dtype="<u8").view(np.uint8)
    packed = packed.reshape(-1, 8)[:, :bits].ravel()  # 8 numbers fill ``bits`` bytes
    return torch.from_numpy(packed[: packed_bytes(numbers.numel(), bits)].copy())


def unpack_bits(
    packed: UInt8[Tensor, " bytes"], bits: int, count: int
) -> UInt8[Tensor, " n"]:
    """Undo ``pack_bits`` for ``count`` numbers.

    Example:
        >>> unpack_bits(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
        [1, 2, 3]
    """
    padded = np.zeros((count + 7) // 8 * bits, dtype=np.uint8)
    padded[: packed.numel()] = packed.numpy()
    words = np.zeros((len(padded) // bits, 8), dtype=np.uint8)
    words[:, :bits] = padded.reshape(-1, bits)
    shifts = np.arange(8, dtype="<u8") * np.uint64(bits)
    numbers = (words.view("<u8") >> shifts) & np.uint64(2**bits - 1)
    return torch.from_numpy(numbers.astype(np.uint8).ravel()[:count])


def _take(full: Tensor, mask: Bool[Tensor, "out in"] | None) -> Tensor:
    """Take what is kept, row by row. Numpy has ten times torch's speed on a CPU."""
    if mask is None:
        return full.contiguous()
    bits, kept = _as_integers(full).ravel(), np.flatnonzero(mask.numpy())
    return torch.from_numpy(bits[kept]).view(full.dtype)


def _scatter(
    kept: Tensor, mask: Bool[Tensor, "out in"] | None, shape: tuple[int, int]
) -> Tensor:
    """Put what is kept in its place, zeros elsewhere; undoes ``_take``."""
    if mask is None:
        return kept.view(shape)
    bits = _as_integers(kept)
    full = np.zeros(shape[0] * shape[1], dtype=bits.dtype)
    full[np.flatnonzero(mask.numpy())] = bits
    return torch.from_numpy(full).view(kept.dtype).view(shape)


def _as_integers(tensor: Tensor) -> np.ndarray:
    """View numbers as integers of the same width: numpy has no bfloat16."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    view: np.ndarray = tensor.contiguous().view(integers[tensor.itemsize]).numpy()
    return view


def _pack_mask(mask: Bool[Tensor, "out in"], storage: Storage) -> Tensor:
    bits = storage.index_bits
    if not bits:
        return torch.from_numpy(np.packbits(mask.numpy().ravel(), bitorder="little"))
    positions = np.flatnonzero(mask.numpy()) % _of(storage)
    return pack_bits(torch.from_numpy(positions.astype(np.uint8)), bits)


def _unpack_mask(packed: Tensor, storage: Storage) -> Bool[Tensor, "out in"]:
    bits = storage.index_bits
    if not bits:
        flat = np.unpackbits(packed.numpy(), count=storage.numel, bitorder="little")
        return torch.from_numpy(flat.view(np.bool_)).view(storage.shape)
    of = _of(storage)
    positions = unpack_bits(packed, bits, storage.kept).numpy()
    starts = np.arange(0, storage.numel, of)[:, None]
    mask = np.zeros(storage.numel, dtype=np.bool_)
    mask[(positions.reshape(len(starts), -1) + starts).ravel()] = True
    return torch.from_numpy(mask).view(storage.shape)


def _of(storage: Storage) -> int:
    assert storage.mask is not None
    return int(storage.mask.partition(":")[2])
