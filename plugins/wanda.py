"""Wanda: weights times the norm of their inputs, compared within each output row."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.masks import kept_by_pattern, kept_by_sparsity
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value


class Wanda(CompressionMethod):
    """Remove the weights with the smallest ``|w| * ||x||``, row by row.

    How we differ: counts are exact, ``round(sparsity * in)`` a row, where the published
    code truncates.
    """

    name = "wanda"
    reference = "Sun et al. 2023, arXiv:2306.11695, Eq. 1"
    needs = frozenset({"input_norm"})
    parameters = (preconditions.SPARSITY, preconditions.PATTERN)

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters."""
        return preconditions.check_sparsity_or_pattern(self.name, super().check(params))

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_without_input(
            layer
        ) or preconditions.refuse_pruning(layer, previous, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return preconditions.pruned_storage(previous, {**settings, "per": "row"})

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
        variants = []
        for one in settings:
            if one["pattern"] is not None:
                kept = kept_by_pattern(scores, one["pattern"])
            else:
                kept = kept_by_sparsity(scores, one["sparsity"], per="row")
            variant, pattern = source.variant, one["pattern"]
            variants.append(variant.pruned(variant.weight, kept, pattern=pattern))
        return variants


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Wanda()]
