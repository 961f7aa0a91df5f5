"""Weights rounded to nearest and made into variants, for methods that choose scales."""

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.codebooks import encode
from autoprune.compression.grids import fit_grid, nearest_codes
from autoprune.compression.variant import Variant

_WIDEST = 1e4
"""Scales stay within this factor of one, so that float16 holds them and products."""


def round_to_grid(
    variant: Variant,
    weight: Float[Tensor, "out in"],
    *,
    bits: int,
    group: int | None,
    symmetric: bool,
    channel_scales: Float[Tensor, " in"] | None = None,
) -> Variant:
    """Round weights to the nearest of ``2**bits`` evenly spaced numbers.

    Args:
        variant: What the step before has left; its mask stays.
        weight: Finite weights, in float32, already multiplied by ``channel_scales``.
        bits: Bits of a code.
        group: Weights of a row that share a grid; None for the whole row.
        symmetric: True for no zero points.
        channel_scales: Divides each input's weights again when they are read.
    """
    dtype = getattr(torch, variant.storage.dtype)
    scales, zeros = fit_grid(
        weight, bits=bits, group=group, symmetric=symmetric, dtype=dtype
    )
    return variant.quantized(
        nearest_codes(weight, scales, zeros, bits=bits),
        scales,
        None if symmetric else zeros.byte(),
        bits=bits,
        group=group,
        channel_scales=channel_scales,
    )


def round_to_codebook(
    variant: Variant, weight: Float[Tensor, "out in"], name: str, *, group: int | None
) -> Variant:
    """Round weights to the nearest numbers of a code book.

    Args:
        variant: What the step before has left; its mask stays.
        weight: Finite weights, in float32.
        name: A format with a code book, out of ``FORMATS``.
        group: Weights of a row that share a scale; None for the whole row.
    """
    dtype = getattr(torch, variant.storage.dtype)
    coded = encode(weight, name, group=group, dtype=dtype)
    bits = variant.storage.coded(name, group).bits
    assert bits is not None
    return variant.quantized(
        coded.codes,
        coded.scales,
        None,
        bits=bits,
        group=group,
        code=name,
        tensor_scale=coded.tensor_scale,
    )


def smoothing(
    largest_input: Float[Tensor, " in"],
    largest_weight: Float[Tensor, " in"],
    alpha: float,
) -> Float[Tensor, " in"]:
    """Give SmoothQuant's scale of each input (arXiv:2211.10438, Eq. 4).

    It is one where an input or its weights are all zeros.

    Example:
        >>> smoothing(torch.tensor([16.0, 0.0]), torch.tensor([4.0, 2.0]), 0.5)
        tensor([2., 1.])
    """
    dead = (largest_input == 0) | (largest_weight == 0)
    scales = largest_input.pow(alpha) / largest_weight.pow(1 - alpha)
    return scales.masked_fill(dead, 1.0).clamp(1 / _WIDEST, _WIDEST)
