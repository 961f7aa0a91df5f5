"""INT8 with dynamic activations: rows of whole numbers from -128 to 127."""

from collections.abc import Sequence

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.rounding import round_to_grid
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer


class Int8Dynamic(CompressionMethod):
    """Round each row to 8 bits around zero: ``rtn(bits=8, symmetric=true)`` by name.

    A runtime that multiplies in INT8 also rounds the activations, each token by its own
    largest value. How we differ: this is the weight's part alone. Activations are
    rounded where the model runs and not while AutoPrune measures quality.
    """

    name = "int8_dynamic"
    reference = "Dettmers et al. 2022, arXiv:2208.07339, vector-wise quantization"

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_quantization(layer, previous, {"group": None})

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return previous.quantized(8, None, symmetric=True)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        return [[_rounded(source)] * len(settings) for source in sources]


def _rounded(source: Source) -> Variant:
    weight = preconditions.finite_weight(source)
    return round_to_grid(source.variant, weight, bits=8, group=None, symmetric=True)


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Int8Dynamic()]
