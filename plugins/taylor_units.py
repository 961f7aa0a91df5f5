"""Channels and heads by what the loss would change without them, as LLM-Pruner does."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.gradients import finite_gradient, gradient_norm
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.structured import KEEP, StructuredMethod, in_units
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics

IMPORTANCE = Parameter(
    "importance",
    str,
    "param_first",
    "What is summed up.",
    choices=("param_first", "param_second", "param_mix", "vector"),
)


class TaylorUnits(StructuredMethod):
    """Remove the units of a site whose removal moves the loss least.

    With ``g`` the gradient of the mean loss and ``h`` the mean of the squares of the
    windows' gradients, the diagonal of the empirical Fisher matrix, a unit counts by
    the sum, over its weights in all layers of the site, of

    - ``|w g|`` for ``param_first`` (Eq. 5, to first order);
    - ``h w² / 2`` for ``param_second``;
    - ``|w g - h w² / 2|`` for ``param_mix`` (Eq. 5);

    or, for ``vector``, by the sum over layers of ``|sum of w g|`` (Eq. 3). How we
    differ: ratios are each site's own, so scores are compared within a site only; heads
    go in whole groups that share keys and values; widths go in steps; the authors'
    linear layers merge a removed row into its likest neighbour, ours drop it.
    """

    reference = "Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, Sec. 3.2"
    needs = frozenset({"gradient", "gradient_square"})
    parameters = (KEEP, IMPORTANCE)

    def scores(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Settings,
    ) -> Float[Tensor, " units"]:
        """Score every unit."""
        kind = settings["importance"]
        parts = []
        for source in sources:
            own = in_units(source, changes_of_loss(source, kind)).double().sum(1)
            parts.append(own.abs() if kind == "vector" else own)
        return torch.stack(parts).sum(0)


def changes_of_loss(source: Source, importance: str) -> Float[Tensor, "out in"]:
    """Estimate what the loss changes by without each weight alone.

    Args:
        source: A layer with its gradients.
        importance: A choice of ``IMPORTANCE``. The result holds sizes, but for
            ``vector``, which is signed.
    """
    weight = preconditions.finite_weight(source)
    if importance == "param_second":
        return (weight * gradient_norm(source)).square() / 2
    first = weight * finite_gradient(source, "mean")
    if importance == "param_mix":
        first -= (weight * gradient_norm(source)).square() / 2
    return first if importance == "vector" else first.abs()


class TaylorChannels(TaylorUnits):
    """Remove channels of an MLP; see ``TaylorUnits``."""

    name = "taylor_channels"
    kinds = frozenset({"channels"})


class TaylorHeads(TaylorUnits):
    """Remove heads of an attention, in groups that share keys and values."""

    name = "taylor_heads"
    kinds = frozenset({"heads"})


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the methods."""
    return [TaylorChannels(), TaylorHeads()]
