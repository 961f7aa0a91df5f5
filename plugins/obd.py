"""Optimal Brain Damage: what a weight costs when no other makes up for it."""

from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.scoring import BY_LAYER, ScoringMethod
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics


class Obd(ScoringMethod):
    """Remove the weights with the smallest ``h_jj w² / 2``; others stay as they are.

    The curvature is that of the layer's squared output error, whose Hessian has the
    squared norms of the inputs on its diagonal. Within a row the order is Wanda's,
    whose score is the root of twice this one; here all weights of a layer compete by
    default, since the score is a loss and losses of rows add up.

    How we differ: the paper takes the curvature of the network's loss and prunes in
    several rounds with training between.
    """

    name = "obd"
    reference = "LeCun et al. 1989, Optimal Brain Damage, NIPS 2"
    needs = frozenset({"input_norm"})
    parameters = BY_LAYER

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Score every weight: what the layer loses with it."""
        norm = preconditions.finite_input_norm([source], statistics)
        # Norms before squares: the square of a small weight alone may fall to zero.
        return (preconditions.finite_weight(source) * norm).square() / 2


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Obd()]
