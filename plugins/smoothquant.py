"""SmoothQuant: large inputs made smaller and their weights larger, then 8 bits."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.rounding import round_to_grid, smoothing
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer


class SmoothQuant(CompressionMethod):
    """Round ``W diag(s)``, with ``s_j = max|x_j|^a / max|w_j|^(1 - a)``.

    The runtime divides the inputs by ``s`` and rounds them to 8 bits, token by token:
    that is what the method is for. A variant holds the weight's side: codes of the
    scaled weight, and ``s``, with which the weight reads as ``Q(W diag(s)) / s``. How
    we differ: activations are not rounded while AutoPrune measures quality, so what the
    smoothing gains there is not seen, only what it costs the weights; and ``s`` is
    stored for each layer and counted, where the paper folds one ``s`` for q, k and v
    into the norm before them.
    """

    name = "smoothquant"
    reference = "Xiao et al. 2022, arXiv:2211.10438, Eq. 4"
    needs = frozenset({"input_max"})
    parameters = (
        Parameter("bits", int, 8, "Bits of a code.", 2, 8),
        preconditions.GROUP,
        Parameter("symmetric", bool, True, "No zero points are stored."),
        Parameter("alpha", float, 0.5, "How much moves from inputs to weights.", 0, 1),
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
        return previous.quantized(
            settings["bits"],
            settings["group"],
            settings["symmetric"],
            channel_scales=True,
        )

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        largest = preconditions.finite_input_max(sources, statistics)
        return [
            [_smooth(source, largest, one) for one in settings] for source in sources
        ]


def _smooth(
    source: Source, largest_input: Float[Tensor, " in"], settings: Settings
) -> Variant:
    weight = preconditions.finite_weight(source)
    dtype = getattr(torch, source.variant.storage.dtype)
    scales = smoothing(largest_input, weight.abs().amax(0), settings["alpha"])
    scales = scales.to(dtype).float()  # as they are stored
    return round_to_grid(
        source.variant,
        weight * scales,
        bits=settings["bits"],
        group=settings["group"],
        symmetric=settings["symmetric"],
        channel_scales=scales,
    )


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [SmoothQuant()]
