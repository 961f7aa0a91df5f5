"""Quantization grids: the scales and zero points on which weights are rounded.

A weight is ``(code - zero) * scale``. Zero itself is always on the grid, so pruned
weights stay exact zeros, and the zeros of an earlier step never widen a grid.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def grid_of_range(
    low: Float[Tensor, "*shape"],
    high: Float[Tensor, "*shape"],
    *,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Fit grids to ranges of weights.

    The scale is rounded up to the layer's type before any code is chosen: codes then
    fit the scale that is stored, and no weight lies over half a step from the grid.

    Args:
        low: Smallest weight of each group.
        high: Largest weight of each group.
        bits: Bits of a code.
        symmetric: True for a zero point in the middle, which need not be stored.
        dtype: Type in which scales are stored.

    Returns:
        Scales, as float32 that ``dtype`` represents exactly, and the codes of zero.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    steps = 2**bits - 1
    if symmetric:
        scale = round_up(torch.maximum(-low, high) / (steps / 2), dtype)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = round_up(high / steps - low / steps, dtype)
    return scale, (-low / scale).round_().clamp_(0, steps)


def fit_grid(
    weight: Float[Tensor, "out in"],
    *,
    bits: int,
    group: int | None,
    symmetric: bool,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Fit a grid to every row, or to every ``group`` weights of a row.

    Returns:
        Scales and codes of zero, as ``grid_of_range``.
    """
    rows, columns = weight.shape
    low, high = weight.view(rows, -1, group or columns).aminmax(dim=2)
    return grid_of_range(low, high, bits=bits, symmetric=symmetric, dtype=dtype)


def nearest_codes(
    weight: Float[Tensor, "out in"],
    scales: Float[Tensor, "out groups"],
    zeros: Float[Tensor, "out groups"],
    *,
    bits: int,
) -> UInt8[Tensor, "out in"]:
    """Round weights to the nearest code of their group's grid."""
    grouped = weight.view(*scales.shape, -1)
    codes = (grouped / scales[..., None]).round_().add_(zeros[..., None])
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8).view(weight.shape)


def round_up(
    scale: Float[Tensor, "*shape"], dtype: torch.dtype
) -> Float[Tensor, "*shape"]:
    """Round to the type, upwards; 1 where all weights of a group are zeros."""
    info = torch.finfo(dtype)
    empty = scale == 0
    scale = scale.clamp(min=info.tiny)
    rounded = scale.to(dtype).float()
    # Half a relative step more reaches the next number above, and no further.
    above = (scale * (1 + info.eps / 2)).to(dtype).float()
    return torch.where(rounded < scale, above, rounded).masked_fill_(empty, 1.0)
