"""GPTQ: columns are rounded in turn, and later ones make good the error."""

from collections.abc import Sequence

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.solver import solve
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer


class Gptq(CompressionMethod):
    """Round columns one by one with the error spread over those still to come.

    With ``act_order`` the columns with the largest inputs go first and grids come from
    the original weights, so that groups stay contiguous; without it grids are fitted
    when the sweep reaches their group. How we differ: ``act_order`` is the default,
    since plain GPTQ at 4 bits is worse than rounding on small models. Weights that an
    earlier step has pruned stay zeros, and the others make up for them.
    """

    name = "gptq"
    reference = "Frantar et al. 2022, arXiv:2210.17323, Algorithm 1"
    needs = frozenset({"hessian"})
    parameters = (
        preconditions.BITS,
        preconditions.GROUP,
        preconditions.SYMMETRIC,
        Parameter("act_order", bool, True, "Columns with the largest inputs first."),
        preconditions.DAMPING,
    )

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_without_input(
            layer
        ) or preconditions.refuse_quantization(layer, previous, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return preconditions.quantized_storage(previous, settings)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        return solve(sources, statistics, settings)


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Gptq()]
