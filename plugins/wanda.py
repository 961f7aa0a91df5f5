"""Wanda: weights times the norm of their inputs, compared within each output row."""

from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.scoring import ScoringMethod
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics


class Wanda(ScoringMethod):
    """Remove the weights with the smallest ``|w| * ||x||``, row by row.

    How we differ: counts are exact, ``round(sparsity * in)`` a row, where the published
    code truncates. Comparing over the whole layer (``per=layer``) and tiles, which
    count as the sum of their weights' scores, are ours.
    """

    name = "wanda"
    reference = "Sun et al. 2023, arXiv:2306.11695, Eq. 1"
    needs = frozenset({"input_norm"})

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Score every weight."""
        norm = preconditions.finite_input_norm([source], statistics)
        return preconditions.finite_weight(source).abs() * norm


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Wanda()]
