"""FLAP: units go whose part of the output fluctuates least, not the smallest ones."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.structured import StructuredMethod
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics


class Fluctuation(StructuredMethod):
    """Remove the units of a site whose outputs are nearest to constant.

    A column of the layer that takes the units counts ``var(x_j) * sum_i W_ij²``, the
    variance over all tokens of what it adds to the outputs, and a unit counts the mean
    of its columns (weighted input feature variance). A unit with a large but constant
    output is thus worth nothing, where Wanda's score would keep it.

    How we differ: the paper adds the mean output that is lost as a bias of the taker;
    a variant is one weight matrix, so that compensation is not there yet and constant
    outputs are lost. Ratios are each site's own: the paper standardises scores of every
    layer and compares them over the whole model. Heads go in whole groups that share
    keys and values; widths go in steps.
    """

    name = "flap"
    reference = "An et al. 2023, arXiv:2312.11983 (WIFV)"
    needs = frozenset({"input_norm", "input_sum"})

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


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the methods."""
    return [Fluctuation()]
