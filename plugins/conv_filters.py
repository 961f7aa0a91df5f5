"""Filters of convolutions that go as a whole, with all that reads what they give.

They also go by other scores: ``channels``, ``taylor_channels``, ``flap`` and ``ziplm``
treat the filters of a block as they do the channels of an MLP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.checks import require_finite
from autoprune.compression.gradients import finite_gradient
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.structured import KEEP, StructuredMethod, in_units
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.models.structures import STREAM
from autoprune.policy import Layer

SCORE = Parameter(
    "score",
    str,
    "l1",
    "Norm of a filter, or the size of its factor in the norm behind it.",
    choices=("l1", "l2", "norm_scale"),
)
NORM = Parameter(
    "norm", str, "l2", "Size of all that a channel has.", choices=("l1", "l2")
)


class Filters(StructuredMethod):
    """Remove filters, with the columns of the layer that reads what they give.

    A filter counts by its own L1 norm (Li et al. 2016), its L2 norm, or by the size of
    its factor in the batch norm behind it (network slimming, Liu et al. 2017,
    arXiv:1708.06519, Sec. 3), which says most after training with an L1 penalty on the
    factors. How we differ: ratios are each site's own, so scores are compared within a
    site only; widths go in steps.
    """

    name = "filters"
    reference = "Li et al. 2016, arXiv:1608.08710, Sec. 3.1"
    kinds = frozenset({"channels"})
    parameters = (KEEP, SCORE)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        reason = super().refuses(layer, previous, settings)
        makes = layer.cut is not None and layer.cut.axis == "rows"
        if reason is None and settings["score"] == "norm_scale" and makes:
            if layer.norm is None:
                reason = "no norm is known that scales its outputs: take score=l1"
        return reason

    def scores(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Settings,
    ) -> Float[Tensor, " units"]:
        """Score every filter, by the layers that make it."""
        for source in sources:  # those that read filters are cut by what is found
            preconditions.finite_weight(source)
        return sum_of(
            [_score(source, settings["score"]) for source in _makers(sources)]
        )


class TaylorFilters(StructuredMethod):
    """Remove filters whose removal changes the loss least, to first order.

    ``(sum of w g)²`` over the weights of a filter, the square of what the loss loses
    with the whole of it. How we differ: as for ``filters``; the paper's gates stand
    behind the batch norm, ours is the filter itself.
    """

    name = "taylor_filters"
    reference = "Molchanov et al. 2019, arXiv:1906.10771, Eq. 8"
    kinds = frozenset({"channels"})
    needs = frozenset({"gradient"})

    def scores(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Settings,
    ) -> Float[Tensor, " units"]:
        """Score every filter, by the layers that make it."""
        lost = {
            one.layer: preconditions.finite_weight(one) * finite_gradient(one, "mean")
            for one in sources  # those that read filters are checked with them
        }
        found = [in_units(one, lost[one.layer]).sum(1) for one in _makers(sources)]
        return sum_of(found).square()


class StreamFilters(StructuredMethod):
    """Remove channels of a residual stream, from all that write to it or read it.

    A channel counts by the norm of everything that goes with it: rows of the layers
    that are added up, columns of those behind. How we differ: ratios are each stream's
    own, and no sparsity is trained into the groups.
    """

    name = "stream_filters"
    reference = "Fang et al. 2023, DepGraph, arXiv:2301.12900, Sec. 3.3"
    kinds = frozenset({STREAM})
    parameters = (KEEP, NORM)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return super().refuses(_in_stream(layer), previous, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores; units are those inside of a block."""
        stored = super().storage(_in_stream(layer), previous, settings)
        return replace(stored, units=None)

    def compress_site(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants of all layers of a stream."""
        seen = [replace(one, layer=_in_stream(one.layer)) for one in sources]
        made = super().compress_site(seen, statistics, settings)
        return [
            [replace(one, storage=replace(one.storage, units=None)) for one in variants]
            for variants in made
        ]

    def scores(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Settings,
    ) -> Float[Tensor, " units"]:
        """Score every channel."""
        weights = [in_units(one, preconditions.finite_weight(one)) for one in sources]
        if settings["norm"] == "l1":
            return sum_of([own.abs().sum(1) for own in weights])
        return sum_of([own.square().sum(1) for own in weights]).sqrt()


def sum_of(parts: Sequence[Float[Tensor, " units"]]) -> Float[Tensor, " units"]:
    """Add up what several layers make of the same units."""
    return torch.stack(list(parts)).sum(0)


def _in_stream(layer: Layer) -> Layer:
    """See a layer as a part of its residual stream."""
    stream = layer.hidden if layer.hidden and layer.hidden.kind == STREAM else None
    return replace(layer, cut=stream)


def _makers(sources: Sequence[Source]) -> list[Source]:
    return [one for one in sources if one.layer.cut and one.layer.cut.axis == "rows"]


def _score(source: Source, score: str) -> Float[Tensor, " units"]:
    if score == "norm_scale":
        if source.norm_scale is None:
            raise MethodError(f"the norm behind {source.layer.name} was not given")
        require_finite(source.norm_scale, "scale of the norm", source.layer.name)
        return in_units(source, source.norm_scale.float()[:, None]).abs().sum(1)
    own = in_units(source, preconditions.finite_weight(source))
    return own.abs().sum(1) if score == "l1" else own.square().sum(1).sqrt()


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the methods."""
    return [Filters(), TaylorFilters(), StreamFilters()]
