"""FP8: weights as floats of 8 bits, with four of exponent and three of mantissa."""

from collections.abc import Mapping, Sequence

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.rounding import round_to_codebook
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value


class Fp8(CompressionMethod):
    """Round each weight to the nearest number of E4M3, scaled so that the largest fits.

    The scale of a row or group is in the layer's type, that of a tensor in float32.
    How we differ: scales are rounded up to the type in which they are stored before any
    weight is rounded. Activations are rounded where the model runs, token by token, and
    not while AutoPrune measures quality.
    """

    name = "fp8"
    reference = "Micikevicius et al. 2022, arXiv:2209.05433, Sec. 3 (E4M3)"
    parameters = (
        Parameter(
            "per",
            str,
            "row",
            "Weights that share a scale.",
            choices=("row", "tensor"),
        ),
        preconditions.GROUP,
    )

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters."""
        settings = super().check(params)
        if settings["per"] == "tensor" and settings["group"] is not None:
            raise MethodError(
                f"fp8 takes groups only per row, found group={settings['group']} and "
                "per=tensor. Leave out one of them."
            )
        return settings

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_quantization(layer, previous, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return previous.coded(_code(settings), settings["group"])

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
                round_to_codebook(
                    source.variant, weight, _code(one), group=one["group"]
                )
                for one in settings
            ]
            for source, weight in zip(sources, weights, strict=True)
        ]


def _code(settings: Settings) -> str:
    return "fp8_e4m3_tensor" if settings["per"] == "tensor" else "fp8_e4m3"


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Fp8()]
