"""Rounds weights and activations as the kernels want them.

Only what timing needs: how weights are rounded well is the methods' part.
"""

import torch
from jaxtyping import Float
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_TOP = 448.0
"""The largest number of the type."""

INT8_TOP = 126.0
"""Activations stay one under 127: so no rounding in 16 bits runs over."""

LEAST = 1e-6
"""Rows of zeros are divided by this, not by zero."""


def to_rows(
    weight: Float[Tensor, "n k"], top: float
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
    """Scale every row so that its largest is ``top``, and round; give the scales."""
    scales = weight.float().abs().amax(1).clamp(min=LEAST) / top
    return (weight / scales.unsqueeze(1)).round(), scales


def to_groups(
    weight: Float[Tensor, "n k"], group: int
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "groups n 2"]]:
    """Round groups of a row to 16 levels from its least to its largest.

    Returns:
        The codes, 0 to 15, and scale and middle of each group: a weight is
        ``(code - 8) * scale + middle``, as torch's int4 kernels have it.
    """
    n, k = weight.shape
    parts = weight.float().reshape(n, k // group, group)
    low = parts.amin(-1, keepdim=True)
    scales = ((parts.amax(-1, keepdim=True) - low) / 15).clamp(min=LEAST)
    codes = ((parts - low) / scales).round().clamp(0, 15).reshape(n, k)
    pairs = torch.cat([scales, low + 8 * scales], -1)
    return codes, pairs.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def int8_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to int8 token by token; give codes and float32 scales.

    In few operations, because no compiler fuses them here: largest magnitude, factor,
    product, rounding and cast.
    """
    top = _largest(x, dim=-1)
    codes = torch.mul(x, INT8_TOP / top).round_().to(torch.int8)
    return codes, top.float() / INT8_TOP


def fp8_activations(x: Tensor, *, by_row: bool) -> tuple[Tensor, Tensor]:
    """Cast activations to fp8, by one scale or one a token; give float32 scales.

    ``448 * (1 + 2**-8)``, the most that rounding in 16 bits makes of the largest,
    is still rounded to 448.
    """
    top = _largest(x, dim=-1 if by_row else None)
    return torch.mul(x, FP8_TOP / top).to(FP8), top.float() / FP8_TOP


def _largest(x: Tensor, dim: int | None) -> Tensor:
    """Give the largest magnitude, in one pass."""
    keep = dim is not None
    top: Tensor = torch.linalg.vector_norm(x, float("inf"), dim=dim, keepdim=keep)
    return top.clamp_(min=LEAST)
