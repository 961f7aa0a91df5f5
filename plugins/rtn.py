"""Round to nearest: every weight to the closest point of its group's grid."""

from collections.abc import Sequence

from autoprune.compression import preconditions
from autoprune.compression.grids import fit_grid, nearest_codes
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer


class RoundToNearest(CompressionMethod):
    """Round each weight to the nearest of ``2**bits`` evenly spaced numbers.

    The grid spans the weights of a row or group, and holds zero.
    """

    name = "rtn"
    reference = "Jacob et al. 2017, arXiv:1712.05877, Sec. 2.1"
    parameters = (preconditions.BITS, preconditions.GROUP, preconditions.SYMMETRIC)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_quantization(layer, previous, settings)

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
        return [[self._round(source, one) for one in settings] for source in sources]

    def _round(self, source: Source, settings: Settings) -> Variant:
        weight = preconditions.finite_weight(source)
        bits, group = settings["bits"], settings["group"]
        scales, zeros = fit_grid(
            weight,
            bits=bits,
            group=group,
            symmetric=settings["symmetric"],
            dtype=source.variant.weight.dtype,
        )
        return source.variant.quantized(
            nearest_codes(weight, scales, zeros, bits=bits),
            scales,
            None if settings["symmetric"] else zeros.byte(),
            bits=bits,
            group=group,
        )


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [RoundToNearest()]
