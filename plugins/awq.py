"""AWQ: inputs that matter are scaled up before rounding, and grids are clipped."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.rounding import round_to_grid
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer

RATIOS = tuple(step / 20 for step in range(20))
"""Powers of an input's mean size that are tried as its scale; 0 is plain rounding."""

CLIPS = tuple(1 - step / 20 for step in range(1, 11))
"""Parts of a group's largest weight beyond which weights are clipped, if it helps."""

_SMALLEST = 1e-4
"""Mean size, as a part of the largest one, below which inputs count as that small."""

_UNCLIPPED = ("q_", "k_", "query", "key", "qkv", "c_attn")
"""Roles whose outputs meet in a product, where the error of one says little."""


class Awq(CompressionMethod):
    """Round ``W diag(s)`` with the ``s = mean|x|^ratio`` whose outputs err least.

    A grid of 20 ratios is tried; then every group's range is clipped to the part, down
    to one half, that suits its own inputs best, but not of queries and keys. How we
    differ: the output error is exact, ``tr((W - Q) H (W - Q)ᵀ)``, of this layer alone,
    where the published code runs the layers that share an input, or the whole block;
    a row is clipped only where that lowers its error, so none is worse than ``rtn``;
    and ``s`` is stored for each layer and counted, not folded into the layer before.
    """

    name = "awq"
    reference = "Lin et al. 2023, arXiv:2306.00978, Sec. 3.2, Eq. 4 and 5"
    needs = frozenset({"hessian", "input_abs_mean"})
    parameters = (
        preconditions.BITS,
        preconditions.GROUP,
        preconditions.SYMMETRIC,
        Parameter("clip", bool, True, "Ranges are clipped where that helps."),
    )

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_without_input(
            layer
        ) or preconditions.refuse_quantization(layer, previous, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return previous.quantized(
            settings["bits"],
            settings["group"],
            settings["symmetric"],
            channel_scales=True,
        )

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        hessian = preconditions.finite_hessian(sources, statistics)
        means = preconditions.finite_input_abs_mean(sources, statistics)
        return [_search(source, hessian, means, settings) for source in sources]


def scales_of(means: Float[Tensor, " in"], ratio: float) -> Float[Tensor, " in"]:
    """Give the scale of each input: large ones above one, small ones below.

    Divided by the geometric mean of the smallest and the largest, so that both are
    equally far from one.

    Example:
        >>> scales_of(torch.tensor([1.0, 16.0, 4.0]), 0.5)
        tensor([0.5000, 2.0000, 1.0000])
    """
    scales = means.clamp(min=_SMALLEST * float(means.max()) or 1.0).pow(ratio)
    return scales / (scales.min() * scales.max()).sqrt()


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A layer's weight under one choice of scales."""

    source: Source
    hessian: Float[Tensor, "in in"]
    weight: Float[Tensor, "out in"]
    scales: Float[Tensor, " in"]

    def rounded(self, weight: Float[Tensor, "out in"], settings: Settings) -> Variant:
        """Round a scaled weight, clipped or not."""
        return round_to_grid(
            self.source.variant,
            weight,
            bits=settings["bits"],
            group=settings["group"],
            symmetric=settings["symmetric"],
            channel_scales=self.scales,
        )

    def error(self, variant: Variant) -> Float[Tensor, " out"]:
        """Give the squared error of each output over all tokens."""
        change = self.weight - variant.weight.float()
        return ((change @ self.hessian) * change).sum(1)

    def clipped(self, settings: Settings) -> Variant:
        """Round with every group clipped as suits its own inputs best."""
        scaled, group = self.weight * self.scales, settings["group"]
        shape = len(scaled), -1, group or scaled.shape[1]
        limit = scaled.view(shape).abs().amax(2, keepdim=True)
        blocks = _diagonal_blocks(self.hessian, shape[2])
        best, least = limit, self._group_errors(scaled, blocks, settings)
        for part in CLIPS:
            bound = limit * part
            weight = scaled.view(shape).clamp(-bound, bound).view(scaled.shape)
            error = self._group_errors(weight, blocks, settings)
            best = torch.where(error < least, bound, best)
            least = torch.minimum(error, least)
        weight = scaled.view(shape).clamp(-best, best).view(scaled.shape)
        return self.rounded(weight, settings)

    def _group_errors(
        self,
        weight: Float[Tensor, "out in"],
        blocks: Float[Tensor, "groups size size"],
        settings: Settings,
    ) -> Float[Tensor, "out groups 1"]:
        """Give the error that each group alone leaves in each output."""
        change = self.weight - self.rounded(weight, settings).weight.float()
        apart = change.view(len(change), len(blocks), -1).transpose(0, 1)
        return ((apart @ blocks) * apart).sum(2).t()[..., None]


def _search(
    source: Source,
    hessian: Float[Tensor, "in in"],
    means: Float[Tensor, " in"],
    settings: Sequence[Settings],
) -> list[Variant]:
    """Try every ratio for every setting; then clip what has won."""
    weight = preconditions.finite_weight(source)
    dtype = getattr(torch, source.variant.storage.dtype)
    found: list[tuple[float, _Scaled, Variant] | None] = [None] * len(settings)
    for ratio in RATIOS:
        scales = scales_of(means, ratio).to(dtype).float()  # as they are stored
        scaled = _Scaled(source, hessian, weight, scales)
        product = weight * scales
        for index, one in enumerate(settings):
            variant = scaled.rounded(product, one)
            error, best = float(scaled.error(variant).sum()), found[index]
            if best is None or error < best[0]:
                found[index] = error, scaled, variant
    variants = []
    for one, best in zip(settings, found, strict=True):
        assert best is not None
        _, scaled, variant = best
        clips = one["clip"] and not _is_unclipped(source.layer)
        variants.append(_clip(scaled, variant, one) if clips else variant)
    return variants


def _clip(scaled: _Scaled, plain: Variant, settings: Settings) -> Variant:
    """Take the clipped rows that err less, and the others as they are."""
    clipped = scaled.clipped(settings)
    better = (scaled.error(clipped) < scaled.error(plain))[:, None]

    def mixed(new: Tensor | None, old: Tensor | None) -> Tensor | None:
        return old if new is None or old is None else torch.where(better, new, old)

    return replace(
        plain,
        codes=mixed(clipped.codes, plain.codes),
        scales=mixed(clipped.scales, plain.scales),
        zeros=mixed(clipped.zeros, plain.zeros),
    )


def _diagonal_blocks(
    hessian: Float[Tensor, "in in"], size: int
) -> Float[Tensor, "groups size size"]:
    """Cut out what the inputs of each group have to do with each other."""
    count = len(hessian) // size
    blocks = hessian.view(count, size, count, size).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).contiguous()


def _is_unclipped(layer: Layer) -> bool:
    return any(word in layer.role for word in _UNCLIPPED)


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Awq()]
