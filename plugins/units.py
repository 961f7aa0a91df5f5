"""Channels and heads: units of a site go by their size, or by size times input."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.structured import KEEP, StructuredMethod, in_units
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics

SCORE = Parameter(
    "score",
    str,
    "wanda",
    "What is compared; wanda is size x input.",
    choices=("wanda", "magnitude"),
)


class Units(StructuredMethod):
    """Remove the units of a site with the smallest scores.

    ``wanda`` sums ``|w| * ||x||`` over what the last layer of the site reads of a unit,
    as Wanda-sp does, the plain rival of FLAP's paper (An et al. 2023, arXiv:2312.11983,
    Sec. 4.1). ``magnitude`` is the L2 norm of all weights of a unit in all layers, the
    rival of LLM-Pruner (Ma et al. 2023, arXiv:2305.11627, Sec. 4.1). How we differ:
    ratios are each site's own, so scores are compared within a site only; heads go in
    whole groups that share keys and values; widths go in steps.
    """

    needs = frozenset({"input_norm"})
    parameters = (KEEP, SCORE)

    def scores(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Settings,
    ) -> Float[Tensor, " units"]:
        """Score every unit."""
        weights = [preconditions.finite_weight(source) for source in sources]
        if settings["score"] == "magnitude":
            parts = zip(sources, weights, strict=True)
            squares = [in_units(s, w.square()).sum(1) for s, w in parts]
            return torch.stack(squares).sum(0).sqrt()
        taker, read = sources[-1], statistics[str(sources[-1].layer.input)]
        norm = preconditions.finite_input_norm([taker], read)
        return in_units(taker, weights[-1].abs() * norm).sum(1)


class Channels(Units):
    """Remove channels of an MLP; see ``Units``."""

    name = "channels"
    reference = "An et al. 2023, arXiv:2312.11983, Sec. 4.1 (Wanda-sp)"
    kinds = frozenset({"channels"})


class Heads(Units):
    """Remove heads of an attention, in groups that share keys and values."""

    name = "heads"
    reference = "An et al. 2023, arXiv:2312.11983, Sec. 4.1 (Wanda-sp)"
    kinds = frozenset({"heads"})


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the methods."""
    return [Channels(), Heads()]
