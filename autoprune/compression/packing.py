"""Small numbers packed without gaps, least significant bit first."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from autoprune.compression.storage import packed_bytes


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
