"""Optimal Brain Damage: what a weight costs when no other makes up for it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions, tiles
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value


class Obd(CompressionMethod):
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
    parameters = (
        preconditions.SPARSITY,
        preconditions.PATTERN,
        replace(tiles.PER, default="layer"),
    )

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters."""
        settings = super().check(params)
        tiles.check_granularity(self.name, params, {**settings, "tile": None})
        return preconditions.check_sparsity_or_pattern(self.name, settings)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_without_input(
            layer
        ) or preconditions.refuse_pruning(layer, previous, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return preconditions.pruned_storage(previous, settings)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        norm = preconditions.finite_input_norm(sources, statistics)
        return [self._prune(source, norm, settings) for source in sources]

    def _prune(
        self, source: Source, norm: Float[Tensor, " in"], settings: Sequence[Settings]
    ) -> list[Variant]:
        # Norms before squares: the square of a small weight alone may fall to zero.
        saliency = (preconditions.finite_weight(source) * norm).square() / 2
        return [preconditions.pruned_variant(source, saliency, one) for one in settings]


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Obd()]
