"""SparseGPT: columns are pruned in turn, and later ones make good the error."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.solver import solve
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value


class SparseGpt(CompressionMethod):
    """Prune columns one by one with the error spread over those still to come.

    A mask is chosen for every 128 columns, over all rows of a layer, or for every M
    columns of a row. With ``bits`` the kept weights are quantized in the same sweep.
    How we differ: counts are exact over the layer, and grids of groups are fitted to
    the kept weights as the sweep finds them.
    """

    name = "sparsegpt"
    reference = "Frantar and Alistarh 2023, arXiv:2301.00774, Algorithm 1"
    needs = frozenset({"hessian"})
    parameters = (
        preconditions.SPARSITY,
        preconditions.PATTERN,
        replace(
            preconditions.BITS, required=False, help="Bits of a code, if quantized."
        ),
        preconditions.GROUP,
        preconditions.SYMMETRIC,
        preconditions.DAMPING,
    )

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters."""
        settings = super().check(params)
        if settings["bits"] is None:
            for name in ("group", "symmetric"):
                if name in params:
                    raise MethodError(
                        f"sparsegpt({name}={params[name]}) has no effect without bits. "
                        "Name bits too, or leave it out."
                    )
        return preconditions.check_sparsity_or_pattern(self.name, settings)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        reason = preconditions.refuse_without_input(layer)
        reason = reason or preconditions.refuse_pruning(layer, previous, settings)
        if reason is None and settings["bits"] is not None:
            return preconditions.refuse_quantization(layer, previous, settings)
        return reason

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        pruned = preconditions.pruned_storage(previous, settings)
        if settings["bits"] is None:
            return pruned
        return preconditions.quantized_storage(pruned, settings)

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
    return [SparseGpt()]
