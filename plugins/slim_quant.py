"""SLiM-Quant: the scale with the least expected error of rounding and clipping."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.grids import nearest_codes, round_up
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer

BINS = 2**14 + 1
"""Bins of the density of a whole tensor: odd, so that zeros are the centre of one."""

OCTAVES = 8.0
"""How far below the absolute maximum a scale is looked for, in powers of two."""

GRIDS = (17, 9, 9)
"""Points of each grid, the next one around the best of the last: 2 % in the end."""

TOGETHER = 2**18
"""Weights whose groups are searched together, so that they stay in the cache."""

_CODE = "int_tensor"


class SlimQuant(CompressionMethod):
    """Round to a symmetric grid whose scale trades rounding errors for clipping errors.

    The error of a scale ``s`` is ``E[(w - s q(w / s))^2]`` over the density of the
    weights, a histogram integrated numerically; a coarse grid of scales is refined
    around its best point. So a few outliers no longer cost all weights their precision:
    one scale then does for a whole tensor. With a mask before it and ``slim_lora``
    after it this is SLiM. How we differ: the density keeps signs, as the grid has one
    step more below zero; grids are even in the logarithm of the scale; with ``group``,
    where a histogram would have more bins than weights, the weights themselves are the
    density. The absolute maximum is among the scales tried, so none is worse than it.
    Least squares may clip the few weights that massive activations hang on: without a
    ``group``, put ``slim_lora`` behind it.
    """

    name = "slim_quant"
    reference = "Mozaffari et al. 2024, SLiM, arXiv:2410.09615, Sec. 3.1"
    parameters = (
        preconditions.BITS,
        replace(
            preconditions.GROUP,
            help="Weights of a row that share a scale; the whole tensor if none.",
        ),
    )

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_quantization(layer, previous, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        bits, group = settings["bits"], settings["group"]
        if group is None:
            return previous.quantized(bits, None, symmetric=True, code=_CODE)
        return previous.quantized(bits, group, symmetric=True)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        return [[_round(source, one) for one in settings] for source in sources]


def expected_error(
    values: Float[Tensor, "groups points"],
    shares: Float[Tensor, "groups points"] | None,
    scales: Float[Tensor, "groups 1"],
    bits: int,
) -> Float[Tensor, "groups 1"]:
    """Integrate the squared error of rounding and clipping over densities.

    Args:
        values: Weights.
        shares: How many weights have each value; None for one each.
        scales: Step of each grid.
        bits: Bits of a code.
    """
    half = 2 ** (bits - 1)
    steps = (values / scales).round_().clamp_(-half, half - 1)
    errors = steps.mul_(scales).sub_(values).square_()
    return (errors if shares is None else errors.mul_(shares)).sum(1, keepdim=True)


def best_scales(
    values: Float[Tensor, "groups points"],
    shares: Float[Tensor, "groups points"] | None,
    *,
    bits: int,
    dtype: torch.dtype,
) -> Float[Tensor, "groups 1"]:
    """Find the scale with the least expected error of each group, grid after grid.

    Args:
        values: Weights, or values that they may have.
        shares: As in ``expected_error``.
        bits: Bits of a code.
        dtype: Type in which scales are stored; only its numbers are tried.
    """
    widest = values.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)
    best, at = round_up(widest, dtype), torch.zeros_like(widest)
    least = expected_error(values, shares, best, bits)
    low, high = at - OCTAVES, at
    for points in GRIDS:
        step = (high - low) / (points - 1)
        for index in range(points):
            octave = low + index * step
            scales = round_up(widest * octave.exp2(), dtype)
            error = expected_error(values, shares, scales, bits)
            better = error < least
            least = torch.where(better, error, least)
            best, at = (
                torch.where(better, scales, best),
                torch.where(better, octave, at),
            )
        low, high = at - step, (at + step).clamp(max=0)
    return best


def density(
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "1 bins"], Float[Tensor, "1 bins"]]:
    """Count weights in bins over their whole range: centres of bins, and counts."""
    top = float(weight.abs().max()) or 1.0
    edge = top * BINS / (BINS - 1)  # the outermost weights are centres of their bins
    counts = torch.histc(weight, BINS, -edge, edge)
    centres = torch.linspace(-1, 1, BINS) * top
    return centres[None], counts[None]


def _round(source: Source, settings: Settings) -> Variant:
    weight = preconditions.finite_weight(source)
    variant, bits, group = source.variant, settings["bits"], settings["group"]
    if group is None:
        scale = best_scales(*density(weight), bits=bits, dtype=torch.float32)
        scales = scale.expand(len(weight), 1)
    else:
        groups = weight.reshape(-1, group)
        parts = torch.split(groups, max(1, TOGETHER // group))
        dtype = variant.weight.dtype
        found = [best_scales(part, None, bits=bits, dtype=dtype) for part in parts]
        scales = torch.cat(found).view(len(weight), -1)
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    codes = nearest_codes(weight, scales, zeros, bits=bits)
    if group is None:
        return variant.quantized(
            codes, None, None, bits=bits, group=None, code=_CODE, tensor_scale=scale[0]
        )
    return variant.quantized(codes, scales, None, bits=bits, group=group)


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [SlimQuant()]
