"""Weights rounded to nearest and made into variants, for methods that choose scales."""

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.codebooks import encode
from autoprune.compression.grids import fit_grid, nearest_codes
from autoprune.compression.variant import Variant


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
