"""Inside of filters: whole kernels that go, and places of kernels, in few patterns.

Single weights and ``N:M`` groups need nothing of their own: a convolution is a matrix
to every method.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from math import comb

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression import preconditions, tiles
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.storage import BITMAP, Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer

SPARSITY = replace(
    preconditions.SPARSITY, help="Fraction of the kernels to remove.", required=True
)
NORM = Parameter("norm", str, "l2", "Size of a kernel.", choices=("l1", "l2"))
KEPT = Parameter("keep", int, 4, "Places that stay of every kernel.", 1, 24)
PATTERNS = Parameter("patterns", int, 8, "Different patterns in a layer.", 1, 64)

MOST_PLACES = 25
"""Places of the largest kernel that patterns are tried on."""

MOST_PATTERNS = 20_000
"""Ways to choose places that are tried: 126 of 4 in 3 x 3, 12,650 of 4 in 5 x 5."""


class Kernels(CompressionMethod):
    """Remove whole kernels, each of one filter and one input channel.

    Known as connectivity pruning; kernels compete within a filter, or within the layer.
    The mask has a bit a kernel. A kernel of one place, as in a 1x1 convolution or a
    linear layer, is a single weight.
    """

    name = "kernels"
    reference = "Mao et al. 2017, arXiv:1705.08922, Sec. 3 (2-D granularity)"
    parameters = (SPARSITY, tiles.PER, NORM)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_pruning(layer, previous, _in_tiles(layer, settings))

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return preconditions.pruned_storage(previous, _in_tiles(layer, settings))

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        return [
            [_without_kernels(source, one) for one in settings] for source in sources
        ]


class KernelPatterns(CompressionMethod):
    """Keep as many places of every kernel, in one of few patterns a layer.

    As PatDNN: each kernel votes for the pattern that keeps most of its L2 norm; the
    patterns with most votes are the layer's, earlier ones first on ties; each kernel
    then takes the one of them that keeps most. How we differ: any places make a
    pattern, where the paper's share the middle one; nothing is trained; and the mask
    that is stored has a bit a weight, since ``packed`` knows no numbers of patterns: a
    3x3 kernel pays 9 bits, where 8 patterns need 3.
    """

    name = "kernel_patterns"
    reference = "Niu et al. 2020, PatDNN, arXiv:2001.00138, Sec. 4.1"
    parameters = (KEPT, PATTERNS)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        places, keep = layer.kernel, settings["keep"]
        if not keep < places <= MOST_PLACES or layer.shape[1] % places:
            return (
                f"its kernels have {places} places: {keep} are kept of more than that, "
                f"and of {MOST_PLACES} at most. Leave it out, or name convolutions"
            )
        if (ways := comb(places, keep)) > MOST_PATTERNS:
            return (
                f"there are {ways} ways to keep {keep} of {places} places. Take a keep "
                f"that has {MOST_PATTERNS} at most"
            )
        no_tiles = {"sparsity": None, "pattern": None, "tile": None}
        return preconditions.refuse_pruning(layer, previous, no_tiles)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        kept = layer.numel // layer.kernel * settings["keep"]
        return previous.masked(kept, BITMAP)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        return [[_patterned(source, one) for one in settings] for source in sources]


def in_patterns(
    kernels: Float[Tensor, "kernels places"], keep: int, patterns: int
) -> Bool[Tensor, "kernels places"]:
    """Mark the places that stay of every kernel; see ``KernelPatterns``.

    Example:
        >>> kernels = torch.tensor([[3.0, 2.0, 1.0], [4.0, 3.0, 1.0], [1.0, 0.0, 3.0]])
        >>> in_patterns(kernels, keep=2, patterns=1).int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [1, 1, 0]], dtype=torch.int32)
    """
    places = kernels.shape[1]
    known = torch.zeros(comb(places, keep), places)
    for row, stay in enumerate(combinations(range(places), keep)):
        known[row, list(stay)] = 1
    held = kernels.double().square() @ known.double().T
    votes = held.argmax(1).bincount(minlength=len(known))
    chosen = votes.argsort(descending=True, stable=True)[:patterns].sort().values
    return known[chosen][held[:, chosen].argmax(1)].bool()


def _in_tiles(layer: Layer, settings: Settings) -> Settings:
    """Tell the tile that a kernel is; none where it is a single weight."""
    tile = f"1x{layer.kernel}" if layer.kernel > 1 else None
    return {**settings, "pattern": None, "tile": tile}


def _without_kernels(source: Source, settings: Settings) -> Variant:
    full = _in_tiles(source.layer, settings)
    weight = preconditions.finite_weight(source)
    cut = weight.unflatten(1, (-1, source.layer.kernel))
    sizes = cut.abs().sum(2) if settings["norm"] == "l1" else cut.square().sum(2)
    return preconditions.pruned_variant(source, sizes, full)


def _patterned(source: Source, settings: Settings) -> Variant:
    weight = preconditions.finite_weight(source)
    kernels = weight.reshape(-1, source.layer.kernel)
    kept = in_patterns(kernels, settings["keep"], settings["patterns"])
    return source.variant.pruned(source.variant.weight, kept.view(weight.shape))


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the methods."""
    return [Kernels(), KernelPatterns()]
