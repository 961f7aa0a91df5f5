"""MXFP4 and NVFP4: floats of four bits in small groups with scales of one byte."""

from collections.abc import Sequence
from typing import ClassVar

from autoprune.compression import preconditions
from autoprune.compression.formats import FORMATS
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.rounding import round_to_codebook
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer


class Microscaling(CompressionMethod):
    """Round to E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) times a scale.

    Attributes:
        group: Weights of a row that share a scale; the format fixes it.
    """

    group: ClassVar[int]

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        fixed = {"group": self.group}
        return preconditions.refuse_quantization(layer, previous, fixed)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return previous.coded(self.name, self.group)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        return [[self._round(source)] * len(settings) for source in sources]

    def _round(self, source: Source) -> Variant:
        weight = preconditions.finite_weight(source)
        return round_to_codebook(source.variant, weight, self.name, group=self.group)


class Mxfp4(Microscaling):
    """Groups of 32 whose scale is a power of two: 4.25 bits a weight.

    The scale brings the exponent of the group's largest weight to that of the largest
    number, 6; what then lies above 6 becomes 6. How we differ: a group of zeros may
    have any scale, where the standard leaves it open.
    """

    name = "mxfp4"
    reference = "OCP Microscaling Formats (MX) v1.0; Rouhani et al., arXiv:2310.10537"
    group = FORMATS["mxfp4"].group or 0


class Nvfp4(Microscaling):
    """Groups of 16 whose scale is a float of E4M3, under one scale of the tensor.

    4.5 bits a weight. The tensor's scale brings the largest scale of a group to 448,
    the largest number of E4M3. How we differ: a group too small for its scale takes
    the smallest one, so that its weights become zeros and never NaN.
    """

    name = "nvfp4"
    reference = "NVIDIA 2025, Pretraining LLMs with NVFP4, arXiv:2509.25149"
    group = FORMATS["nvfp4"].group or 0


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the methods."""
    return [Mxfp4(), Nvfp4()]
