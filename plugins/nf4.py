"""NF4: weights as quantiles of a normal distribution, four bits each."""

from collections.abc import Sequence

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.rounding import round_to_codebook
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer


class Nf4(CompressionMethod):
    """Round each weight to one of 16 normal quantiles times its group's largest weight.

    Zero is one of the 16. How we differ: groups lie within a row, and scales stay in
    the layer's type: the paper's second quantization, of the scales, is left out.
    """

    name = "nf4"
    reference = "Dettmers et al. 2023, arXiv:2305.14314, Sec. 3"
    parameters = (
        Parameter("group", int, 64, "Weights of a row that share a scale.", 2, 65536),
    )

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_quantization(layer, previous, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return previous.coded(self.name, settings["group"])

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        weights = [preconditions.finite_weight(source) for source in sources]
        return [
            [
                round_to_codebook(source.variant, weight, self.name, group=one["group"])
                for one in settings
            ]
            for source, weight in zip(sources, weights, strict=True)
        ]


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Nf4()]
