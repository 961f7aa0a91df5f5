"""FLAP: units go whose part of the output fluctuates least, not the smallest ones."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.structured import KEEP, StructuredMethod
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer

BIAS = Parameter(
    "bias", bool, True, "Add the mean output that is lost to the taker's bias."
)


class Fluctuation(StructuredMethod):
    """Remove the units of a site whose outputs are nearest to constant.

    A column of the layer that takes the units counts ``var(x_j) * sum_i W_ij²``, the
    variance over all tokens of what it adds to the outputs, and a unit counts the mean
    of its columns (weighted input feature variance). A unit with a large but constant
    output is thus worth little, where Wanda's score would keep it: what it gives on
    average is kept as a bias of the taker, ``W (1 - M) mean(x)`` with ``M`` the columns
    that stay (Sec. 3.3, baseline bias compensation). What is lost is then no more than
    the fluctuation that the score counts.

    How we differ: ratios are each site's own, where the paper standardises scores of
    every layer and compares them over the whole model. Heads go in whole groups that
    share keys and values; widths go in steps. ``bias=false`` leaves the bias out, for
    formats whose architecture has no place for one.
    """

    name = "flap"
    version = "2"
    reference = "An et al. 2023, arXiv:2312.11983 (WIFV)"
    parameters: ClassVar[tuple[Parameter, ...]] = (KEEP, BIAS)
    needs = frozenset({"input_norm", "input_sum"})

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores: the layer that takes units gets a bias."""
        stored = super().storage(layer, previous, settings)
        takes = layer.cut is not None and layer.cut.axis == "columns"
        return stored.biased() if takes and settings["bias"] else stored

    def compress_site(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants of all layers of a site, for several settings at once."""
        made = super().compress_site(sources, statistics, settings)
        taker = sources[-1]
        read = statistics[str(taker.layer.input)]
        mean = preconditions.finite_input_mean([taker], read).double()
        made[-1] = [
            variant.biased(lost_mean(taker, variant, mean)) if one["bias"] else variant
            for one, variant in zip(settings, made[-1], strict=True)
        ]
        return made

    def scores(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Settings,
    ) -> Float[Tensor, " units"]:
        """Score every unit."""
        for source in sources:
            preconditions.finite_weight(source)
        taker, read = sources[-1], statistics[str(sources[-1].layer.input)]
        preconditions.finite_input_norm([taker], read)
        preconditions.finite_input_mean([taker], read)
        assert read.square_sum is not None and read.input_sum is not None
        # In float64: of a nearly constant input the two moments are nearly equal, and
        # rounding may even push its variance below zero.
        square, total = read.square_sum.double(), read.input_sum.double()
        tokens = max(read.tokens, 1)
        variance = (square / tokens - (total / tokens).square()).clamp(min=0)
        columns = taker.variant.weight.double().square().sum(0) * variance
        cut = taker.layer.cut
        assert cut is not None
        return columns.view(cut.units, cut.unit).mean(1)


def lost_mean(
    source: Source, variant: Variant, mean: Float[Tensor, " in"]
) -> Float[Tensor, " out"]:
    """Give the mean output of the columns that a variant has lost.

    Args:
        source: The layer before.
        variant: What is left of it.
        mean: Of every input, in float64.
    """
    assert variant.mask is not None
    lost = source.variant.weight.double().masked_fill(variant.mask, 0.0)
    return lost @ mean


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the methods."""
    return [Fluctuation()]
