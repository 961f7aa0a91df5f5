"""A method that prunes by scores: the least go, and what stays is as it was."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions, tiles
from autoprune.compression.masks import in_tiles
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.storage import Storage, Tile
from autoprune.compression.variant import Variant
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value

BY_ROW = (preconditions.SPARSITY, preconditions.PATTERN, tiles.PER, tiles.TILE)
"""How many weights go, and what competes with what: by default within a row."""

BY_LAYER = (*BY_ROW[:2], replace(tiles.PER, default="layer"), tiles.TILE)
"""The same; by default all weights of a layer compete."""

_COUNTS = frozenset(parameter.name for parameter in BY_ROW)


class ScoringMethod(CompressionMethod):
    """A method that removes the weights, or tiles of them, with the smallest scores.

    A subclass finishes ``scores``; its own parameters follow those of ``BY_ROW`` or
    ``BY_LAYER``. Settings that differ only in these share scores.
    """

    parameters: ClassVar[tuple[Parameter, ...]] = BY_ROW

    @abstractmethod
    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Tell how important every weight is; larger is kept.

        Raises:
            MethodError: If the numbers do not allow it; names layer and reason.
        """

    def tile_scores(
        self,
        source: Source,
        scores: Float[Tensor, "out in"],
        tile: Tile,
        settings: Settings,
    ) -> Float[Tensor, "rows columns"]:
        """Tell how important every tile is: the sum of its weights' scores."""
        return in_tiles(scores, tile).sum(2)

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters."""
        settings = super().check(params)
        preconditions.check_sparsity_or_pattern(self.name, settings)
        return tiles.check_granularity(self.name, params, settings)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        if self.needs and (reason := preconditions.refuse_without_input(layer)):
            return reason
        return preconditions.refuse_pruning(layer, previous, settings)

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
        return [self._prune(source, statistics, settings) for source in sources]

    def _prune(
        self,
        source: Source,
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[Variant]:
        known: dict[tuple[object, ...], Tensor] = {}
        variants = []
        for one in settings:
            kind = tuple(v for n, v in sorted(one.items()) if n not in _COUNTS)
            if kind not in known:
                known[kind] = self.scores(source, statistics, one)
            score = known[kind]
            if one["tile"] is not None:
                tile = tiles.tile_of(source.layer.shape, one)
                if (*kind, tile) not in known:
                    known[*kind, tile] = self.tile_scores(source, score, tile, one)
                score = known[*kind, tile]
            variants.append(preconditions.pruned_variant(source, score, one))
        return variants
