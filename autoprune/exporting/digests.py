"""What a weight is, to the bit, in one short text."""

import hashlib

import torch
from torch import Tensor

from autoprune.models.weights import dtype_name


def digest(weight: Tensor) -> str:
    """Give the SHA-256 of a weight: its type, its shape and every number.

    Minus zero counts as zero, which some formats cannot tell apart.

    Example:
        >>> digest(torch.zeros(2)) == digest(-torch.zeros(2))
        True
    """
    plain = weight.detach().cpu().contiguous()
    if plain.is_floating_point():
        plain = plain + torch.zeros((), dtype=plain.dtype)
    hashes = hashlib.sha256(f"{dtype_name(plain)} {tuple(plain.shape)} ".encode())
    hashes.update(plain.view(torch.uint8).numpy().data)
    return hashes.hexdigest()
