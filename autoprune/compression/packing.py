"""Small numbers packed without gaps, least significant bit first."""

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from autoprune.compression.storage import packed_bytes

_PIECE = 2**20
"""Numbers that are packed at a time, each in 8 bytes on the way; a multiple of 8."""


def pack_bits(numbers: UInt8[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Pack small numbers without gaps, least significant bit first.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
        [33, 3]
    """
    packed = np.empty(packed_bytes(numbers.numel(), bits), dtype=np.uint8)
    for start in range(0, numbers.numel(), _PIECE):
        piece = _pack(numbers[start : start + _PIECE].numpy(), bits)
        packed[start * bits // 8 :][: len(piece)] = piece
    return torch.from_numpy(packed)


def _pack(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    words = np.zeros((len(numbers) + 7) // 8 * 8, dtype="<u8")
    words[: len(numbers)] = numbers
    shifts = np.arange(8, dtype="<u8") * np.uint64(bits)
    packed = (words.reshape(-1, 8) << shifts).sum(1, dtype="<u8").view(np.uint8)
    packed = packed.reshape(-1, 8)[:, :bits].ravel()  # 8 numbers fill ``bits`` bytes
    found: NDArray[np.uint8] = packed[: packed_bytes(len(numbers), bits)]
    return found


def unpack_bits(
    packed: UInt8[Tensor, " bytes"], bits: int, count: int
) -> UInt8[Tensor, " n"]:
    """Undo ``pack_bits`` for ``count`` numbers.

    Example:
        >>> unpack_bits(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
        [1, 2, 3]
    """
    numbers = np.empty(count, dtype=np.uint8)
    for start in range(0, count, _PIECE):
        part = numbers[start : start + _PIECE]
        size = packed_bytes(len(part), bits)
        part[:] = _unpack(packed[start * bits // 8 :][:size].numpy(), bits, len(part))
    return torch.from_numpy(numbers)


def _unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    padded = np.zeros((count + 7) // 8 * bits, dtype=np.uint8)
    padded[: len(packed)] = packed
    words = np.zeros((len(padded) // bits, 8), dtype=np.uint8)
    words[:, :bits] = padded.reshape(-1, bits)
    shifts = np.arange(8, dtype="<u8") * np.uint64(bits)
    numbers = (words.view("<u8") >> shifts) & np.uint64(2**bits - 1)
    return numbers.astype(np.uint8).ravel()[:count]
