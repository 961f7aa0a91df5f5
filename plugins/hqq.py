"""HQQ: zero points moved, without data, so that few weights err much."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.grids import fit_grid
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer

NORM = 0.7
"""The p of the p-norm that is made small; below 1 it forgives outliers."""

_BETA, _KAPPA, _TURNS = 10.0, 1.01, 20
_CODE = "int_float_zero"

Weights = Float[Tensor, "out groups size"]
Zeros = Float[Tensor, "out groups 1"]


class Hqq(CompressionMethod):
    """Alternate between the error that a p-norm shrinks, and the zero point's mean.

    With codes ``q``, scale ``s`` and zero point ``z``: the error ``W - s (q - z)`` is
    shrunk towards zero, ``z`` becomes the mean of ``q - (W - error) / s`` over a group,
    and so on for 20 turns; the scale stays. How we differ: the scale is that of
    ``rtn``, and every group keeps the zero point with the smallest p-norm as it is
    stored, that of ``rtn`` among them, so none is worse; weights that an earlier step
    has pruned have no say and are zeros again when codes are read.
    """

    name = "hqq"
    reference = "Badri and Shaji 2023, Half-Quadratic Quantization (mobiusml.github.io)"
    parameters = (preconditions.BITS, preconditions.GROUP)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_quantization(layer, previous, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return previous.quantized(
            settings["bits"], settings["group"], symmetric=False, code=_CODE
        )

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        return [[_fit(source, one) for one in settings] for source in sources]


@dataclass(frozen=True, eq=False)
class _Grid:
    """The weights of a layer with what stays while zero points move."""

    weight: Weights
    kept: Bool[Tensor, "out groups size"] | None
    scales: Zeros
    bits: int

    def error(self, zeros: Zeros) -> Weights:
        """Give the error of every weight."""
        return self.weight - (self.codes(zeros) - zeros) * self.scales

    def codes(self, zeros: Zeros) -> Weights:
        """Round to the nearest codes."""
        codes = (self.weight / self.scales + zeros).round_()
        return codes.clamp_(0, 2**self.bits - 1)

    def mean(self, numbers: Weights) -> Zeros:
        """Average over the kept weights of each group; 0 where none is."""
        if self.kept is None:
            return numbers.mean(2, keepdim=True)
        count = self.kept.sum(2, keepdim=True).clamp(min=1)
        return (numbers * self.kept).sum(2, keepdim=True) / count

    def norm(self, error: Weights) -> Zeros:
        """Add up the p-th powers of the errors of each group."""
        return self.mean(error.abs().pow(NORM))


def shrink(error: Weights, beta: float) -> Weights:
    """Solve for the error that a p-norm and a pull to the true error agree on.

    The generalised soft threshold ``sign(e) max(0, |e| - |e|^(p-1) / beta)``.
    """
    size = error.abs()
    return error.sign() * (size - size.pow(NORM - 1) / beta).clamp_(min=0)


def _fit(source: Source, settings: Settings) -> Variant:
    weight = preconditions.finite_weight(source)
    variant, bits, group = source.variant, settings["bits"], settings["group"]
    dtype = getattr(torch, variant.storage.dtype)
    scales, start = fit_grid(
        weight, bits=bits, group=group, symmetric=False, dtype=dtype
    )
    shape = *scales.shape, -1
    kept = None if variant.mask is None else variant.mask.view(shape)
    grid = _Grid(weight.view(shape), kept, scales[..., None], bits)
    zeros = _settle(grid, start[..., None], dtype)
    return variant.quantized(
        grid.codes(zeros).to(torch.uint8).view(weight.shape),
        scales,
        zeros[..., 0].to(dtype),
        bits=bits,
        group=group,
        code=_CODE,
    )


def _settle(grid: _Grid, whole: Zeros, dtype: torch.dtype) -> Zeros:
    """Move zero points, rounded as they are stored, and keep the best of each group.

    They start where the smallest weight, or zero, has the code 0 exactly.
    """
    best, least, beta = whole, grid.norm(grid.error(whole)), _BETA
    zeros = -grid.weight.amin(2, keepdim=True).clamp(max=0) / grid.scales
    for _ in range(_TURNS + 1):
        zeros = zeros.to(dtype).float()
        error = grid.error(zeros)
        norm = grid.norm(error)
        best = torch.where(norm < least, zeros, best)
        least = torch.minimum(norm, least)
        goal = grid.weight - shrink(error, beta)
        zeros = grid.mean(grid.codes(zeros) - goal / grid.scales)
        beta *= _KAPPA
    return best


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Hqq()]
