"""What a weight is, to the bit, in one short text."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoprune.models.weights import dtype_name, find_weight

_PIECE = 2**20
"""Numbers that are hashed at a time, so that no second copy is held."""


def digest(weight: Tensor) -> str:
    """Give the SHA-256 of a weight: its type, its shape and every number.

    Minus zero counts as zero, which some formats cannot tell apart.

    Example:
        >>> digest(torch.zeros(2)) == digest(-torch.zeros(2))
        True
    """
    plain = weight.detach().cpu()
    hashes = hashlib.sha256(f"{dtype_name(plain)} {tuple(plain.shape)} ".encode())
    for piece in plain.contiguous().flatten().split(_PIECE):
        if piece.is_floating_point():
            piece = piece + torch.zeros((), dtype=piece.dtype)
        if piece.numel() == 1:  # an expanded one counts as contiguous, at stride 0
            piece = piece.repeat(1)
        hashes.update(piece.view(torch.uint8).numpy().data)
    return hashes.hexdigest()


def digests_of(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Tell what each layer or parameter weighs; what is absent is left out."""
    state = model.state_dict() if names else {}
    found = {}
    for name in names:
        weight = state.get(name)
        if weight is None:
            try:
                weight = find_weight(model, name)
            except AttributeError:  # no such module
                continue
        if weight is not None:
            found[name] = digest(weight)
    return found
