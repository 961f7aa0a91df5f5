"""Kept weights taken out of a matrix and put back, and masks packed to bits."""

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from autoprune.compression.packing import pack_bits, unpack_bits
from autoprune.compression.storage import Storage


def take(full: Tensor, mask: Bool[Tensor, "out in"] | None) -> Tensor:
    """Take what is kept, row by row. Numpy has ten times torch's speed on a CPU."""
    if mask is None:
        return full.contiguous()
    bits, kept = as_integers(full).ravel(), np.flatnonzero(mask.numpy())
    return torch.from_numpy(bits[kept]).view(full.dtype)


def scatter(
    kept: Tensor, mask: Bool[Tensor, "out in"] | None, shape: tuple[int, int]
) -> Tensor:
    """Put what is kept in its place, zeros elsewhere; undoes ``take``."""
    if mask is None:
        return kept.view(shape)
    bits = as_integers(kept)
    full = np.zeros(shape[0] * shape[1], dtype=bits.dtype)
    full[np.flatnonzero(mask.numpy())] = bits
    return torch.from_numpy(full).view(kept.dtype).view(shape)


def in_order(
    full: Shaped[Tensor, "out in"], order: Int[Tensor, " in"] | None
) -> Shaped[Tensor, "out in"]:
    """Give the columns in an order; as they are if there is none."""
    return full if order is None else full[:, order]


def out_of_order(
    full: Shaped[Tensor, "out in"], order: Int[Tensor, " in"] | None
) -> Shaped[Tensor, "out in"]:
    """Give the columns in their own order again; undoes ``in_order``."""
    return full if order is None else full[:, order.argsort()]


def as_integers(tensor: Tensor) -> np.ndarray:
    """View numbers as integers of the same width: numpy has no bfloat16."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    view: np.ndarray = tensor.contiguous().view(integers[tensor.itemsize]).numpy()
    return view


def pack_mask(mask: Bool[Tensor, "out in"], storage: Storage) -> Tensor:
    """Pack a mask as its storage declares it: positions, or one bit a tile."""
    bits = storage.index_bits
    if not bits:
        rows, columns = storage.tile
        corners = mask.numpy()[::rows, ::columns]  # the other bits of a tile are equal
        return torch.from_numpy(np.packbits(corners, bitorder="little"))
    positions = np.flatnonzero(mask.numpy()) % _of(storage)
    return pack_bits(torch.from_numpy(positions.astype(np.uint8)), bits)


def unpack_mask(packed: Tensor, storage: Storage) -> Bool[Tensor, "out in"]:
    """Read a mask; undoes ``pack_mask``."""
    bits = storage.index_bits
    if not bits:
        rows, columns = storage.tile
        count = storage.numel // (rows * columns)
        flat = np.unpackbits(packed.numpy(), count=count, bitorder="little")
        tiles = flat.view(np.bool_).reshape(storage.shape[0] // rows, 1, -1, 1)
        full = torch.from_numpy(tiles).expand(-1, rows, -1, columns)
        return full.reshape(storage.shape)
    of = _of(storage)
    positions = unpack_bits(packed, bits, storage.kept).numpy()
    starts = np.arange(0, storage.numel, of)[:, None]
    mask = np.zeros(storage.numel, dtype=np.bool_)
    mask[(positions.reshape(len(starts), -1) + starts).ravel()] = True
    return torch.from_numpy(mask).view(storage.shape)


def _of(storage: Storage) -> int:
    assert storage.mask is not None
    return int(storage.mask.partition(":")[2])
