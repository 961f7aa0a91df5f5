"""Wanda: weights times the norm of their inputs, compared within each output row."""

from collections.abc import Mapping, Sequence
from functools import cache

from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions, tiles
from autoprune.compression.masks import in_tiles
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.storage import Storage, Tile
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value


class Wanda(CompressionMethod):
    """Remove the weights with the smallest ``|w| * ||x||``, row by row.

    How we differ: counts are exact, ``round(sparsity * in)`` a row, where the published
    code truncates. Comparing over the whole layer (``per=layer``) and tiles, which
    count as the sum of their weights' scores, are ours.
    """

    name = "wanda"
    reference = "Sun et al. 2023, arXiv:2306.11695, Eq. 1"
    needs = frozenset({"input_norm"})
    parameters = (
        preconditions.SPARSITY,
        preconditions.PATTERN,
        tiles.PER,
        tiles.TILE,
    )

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters."""
        settings = super().check(params)
        preconditions.check_sparsity_or_pattern(self.name, settings)
        return tiles.check_granularity(self.name, params, settings)

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
        scores = preconditions.finite_weight(source).abs() * norm

        @cache
        def sums(tile: Tile) -> Float[Tensor, "rows columns"]:
            return in_tiles(scores, tile).sum(2)

        variants = []
        for one in settings:
            score = scores
            if one["tile"] is not None:
                score = sums(tiles.tile_of(source.layer.shape, one))
            variants.append(preconditions.pruned_variant(source, score, one))
        return variants


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Wanda()]
