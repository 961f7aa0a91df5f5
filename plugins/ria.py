"""RIA: how much of its row and of its column a weight is, times its input."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

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


class Ria(CompressionMethod):
    """Remove by relative importance and activations: so that no channel dies out.

    A weight counts as its part of the sizes in its column plus its part of those in
    its row, times the norm of its input to the power of ``power``. All weights of a
    layer compete by default.

    How we differ: counts are exact, and the channel permutation before N:M is left out.
    A variant is one weight in the model's own order of columns, and a permuted pattern
    would hold only in another order: it would have to be folded into the rows of
    whatever makes the input, which other layers share and which norms and residual
    sums stand between, or be stored and paid for at run time.
    """

    name = "ria"
    reference = "Zhang et al. 2024, Plug-and-Play Post-Training Pruning, ICLR"
    needs = frozenset({"input_norm"})
    parameters = (
        preconditions.SPARSITY,
        preconditions.PATTERN,
        replace(tiles.PER, default="layer"),
        Parameter("power", float, 0.5, "Power of the norm of the input.", 0, 2),
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
        """Make variants for every setting; those of equal power share scores."""
        norm = preconditions.finite_input_norm(sources, statistics)
        powers = {p: norm.pow(p) for p in {one["power"] for one in settings}}
        made: list[list[Variant]] = []
        for source in sources:
            parts = relative_importance(preconditions.finite_weight(source))
            scores = {power: parts * factor for power, factor in powers.items()}
            made.append(
                [
                    preconditions.pruned_variant(source, scores[one["power"]], one)
                    for one in settings
                ]
            )
        return made


def relative_importance(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Give each weight's part of its column plus its part of its row.

    Example:
        >>> relative_importance(torch.tensor([[1.0, -1.0], [3.0, 0.0]]))
        tensor([[0.7500, 1.5000],
                [1.7500, 0.0000]])
    """
    sizes = weight.abs()
    tiny = torch.finfo(sizes.dtype).tiny  # rows and columns of zeros have no parts
    columns = sizes.sum(0, keepdim=True).clamp(min=tiny)
    rows = sizes.sum(1, keepdim=True).clamp(min=tiny)
    return sizes / columns + sizes / rows


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Ria()]
