"""Drop: a whole block, attention or MLP is left out; the residual stream passes by."""

from collections.abc import Sequence

import torch

from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer


class Drop(CompressionMethod):
    """Leave out all layers of a site: what they add to the residual stream is zero.

    Which block is best dropped is what the search finds out, policy by policy: removing
    more may be better than removing less (Sieberling et al. 2024, arXiv:2410.14649,
    Sec. 4.1), so no score of single blocks decides here.
    """

    name = "drop"
    reference = "Men et al. 2024, arXiv:2403.03853; Song et al. 2024, arXiv:2402.09025"
    kinds = frozenset({"block", "channels", "heads"})

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        if previous != Storage.dense(layer):
            return "drop stands alone: there is nothing left to prune or to quantize"
        return None

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores: one bit."""
        return previous.masked(0, _whole(layer))

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        return [[_nothing(source)] * len(settings) for source in sources]


def _nothing(source: Source) -> Variant:
    weight = source.variant.weight
    none = torch.zeros(weight.shape, dtype=torch.bool)
    return source.variant.pruned(weight, none, pattern=_whole(source.layer))


def _whole(layer: Layer) -> str:
    return f"{layer.shape[0]}x{layer.shape[1]}"


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Drop()]
