"""Random pruning: the control, which any method that looks at weights has to beat."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions, tiles
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value


class RandomPruning(CompressionMethod):
    """Remove weights or tiles at random, each as likely as any other.

    How we differ: nothing is drawn from a common stream. Scores follow from ``seed``
    and the layer's name alone, so a variant does not depend on what was made before it,
    and what a lower sparsity removes, a higher one removes too.
    """

    name = "random"
    reference = "a control, without a paper"
    parameters = (
        preconditions.SPARSITY,
        preconditions.PATTERN,
        tiles.PER,
        tiles.TILE,
        Parameter("seed", int, 0, "Another seed removes other weights.", 0, 2**31 - 1),
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
        return [self._prune(source, settings) for source in sources]

    def _prune(self, source: Source, settings: Sequence[Settings]) -> list[Variant]:
        preconditions.finite_weight(source)  # raises if a weight is no number
        (rows, columns), name = source.layer.shape, source.layer.name
        scores = cache(random_scores)
        variants = []
        for one in settings:
            high, wide = tiles.tile_of(source.layer.shape, one)
            score = scores((rows // high, columns // wide), name, one["seed"])
            variants.append(preconditions.pruned_variant(source, score, one))
        return variants


def random_scores(
    shape: tuple[int, int], name: str, seed: int
) -> Float[Tensor, "rows columns"]:
    """Draw a number in [0, 1) for each weight or tile of a layer.

    In float64, where ties are too rare to favour a position.

    Args:
        shape: Rows and columns of weights, or of tiles.
        name: Of the layer.
        seed: Of the action.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(shape, generator=generator, dtype=torch.float64)


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [RandomPruning()]
