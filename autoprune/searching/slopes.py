"""Slopes at a trial's policy, site by site: what every choice would change there."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float

from autoprune.evaluation.slopes import LayerSlopes
from autoprune.policy import Layer
from autoprune.searching.space import SearchSpace


@dataclass(frozen=True, eq=False)
class SiteSlopes:
    """What choices would change, ``[sites, choices]``; inf where there is no choice.

    In float32, as they are stored, so that a resumed run computes with the same bits.

    Attributes:
        slope: First-order change of the KL; 0 for the choice that stands.
        error: Standard error of the slope over windows.
        curvature: Second-order change by the diagonal, at least 0; 0 where no labels
            were drawn.
        windows: Of the fitness split, that the gradient was taken on.
    """

    slope: Float[np.ndarray, "sites choices"]
    error: Float[np.ndarray, "sites choices"]
    curvature: Float[np.ndarray, "sites choices"]
    windows: tuple[int, ...]

    @classmethod
    def of(
        cls,
        space: SearchSpace,
        layers: Mapping[Layer, LayerSlopes],
        windows: Sequence[int],
    ) -> Self:
        """Add layers up to sites.

        Args:
            space: The space.
            layers: Slopes of the layers of free sites, a column a choice of the site.
            windows: On which they were taken.
        """
        width = max(len(actions) for actions in space.choices.values())
        shape = (3, len(space.sites), width)
        table = np.full(shape, np.inf, dtype=np.float32)
        for row, site in enumerate(space.sites):
            count = len(space.choices[site.name])
            table[:, row, :count] = 0
            found = [layers[layer] for layer in site.layers if layer in layers]
            if not found:
                continue
            kl = sum(one.kl.double() for one in found)
            score = sum(one.score.double() for one in found)
            assert not isinstance(kl, int) and not isinstance(score, int)
            table[0, row, :count] = kl.mean(0).numpy()
            if len(kl) > 1:
                table[1, row, :count] = (kl.std(0) / len(kl) ** 0.5).numpy()
            if len(score):
                table[2, row, :count] = (score.square().mean(0) / 2).numpy()
        return cls(table[0], table[1], table[2], tuple(windows))

    def to_bytes(self) -> bytes:
        """Write them, for the ledger."""
        file = io.BytesIO()
        table = np.stack([self.slope, self.error, self.curvature])
        np.savez_compressed(file, table=table, windows=np.array(self.windows))
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read them."""
        with np.load(io.BytesIO(data)) as found:
            slope, error, curvature = found["table"]
            return cls(slope, error, curvature, tuple(found["windows"].tolist()))
