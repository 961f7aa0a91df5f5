"""Random pruning: the control, which any method that looks at weights has to beat."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.scoring import BY_ROW, ScoringMethod
from autoprune.compression.storage import Tile
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics


class RandomPruning(ScoringMethod):
    """Remove weights or tiles at random, each as likely as any other.

    How we differ: nothing is drawn from a common stream. Scores follow from ``seed``
    and the layer's name alone, so a variant does not depend on what was made before it,
    and what a lower sparsity removes, a higher one removes too.
    """

    name = "random"
    reference = "a control, without a paper"
    parameters = (
        *BY_ROW,
        Parameter("seed", int, 0, "Another seed removes other weights.", 0, 2**31 - 1),
    )

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        """Score every weight."""
        preconditions.finite_weight(source)  # raises if a weight is no number
        layer = source.layer
        return random_scores(layer.shape, layer.name, settings["seed"])

    def tile_scores(
        self,
        source: Source,
        scores: Float[Tensor, "out in"],
        tile: Tile,
        settings: Settings,
    ) -> Float[Tensor, "rows columns"]:
        """Score every tile, by a number of its own: sums would be near one another."""
        (rows, columns), (high, wide) = source.layer.shape, tile
        grid = rows // high, columns // wide
        return random_scores(grid, source.layer.name, settings["seed"])


def random_scores(
    shape: tuple[int, int], name: str, seed: int
) -> Float[Tensor, "rows columns"]:
    """Draw a number in [0, 1) for each weight or tile of a layer.

    In float64, where ties are too rare to favour a position.

    Args:
        shape: Rows and columns of weights, or of tiles.
        name: Of the layer.
        seed: Of the action.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(shape, generator=generator, dtype=torch.float64)


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [RandomPruning()]
