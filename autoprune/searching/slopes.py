"""Slopes at a trial's policy, site by site: what every choice would change there."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Float

from autoprune.evaluation.slopes import LayerSlopes
from autoprune.policy import Layer, Site
from autoprune.searching.curvature import kind_of, steadied
from autoprune.searching.space import SearchSpace

Table = Float[np.ndarray, "sites choices"]


@dataclass(frozen=True, eq=False)
class SiteSlopes:
    """What choices would change, ``[sites, choices]``; inf where there is no choice.

    In float32, as they are stored, so that a resumed run computes with the same bits.

    Attributes:
        slope: First-order change of the KL; 0 for the choice that stands.
        error: Standard error of the slope over windows.
        curvature: Second-order change by the diagonal, at least 0; 0 where no labels
            were drawn. Steadied by what all pairs of positions say, where they do.
        windows: Of the fitness split, that the gradient was taken on.
    """

    slope: Table
    error: Table
    curvature: Table
    windows: tuple[int, ...]

    @classmethod
    def of(
        cls,
        space: SearchSpace,
        layers: Mapping[Layer, LayerSlopes],
        windows: Sequence[int],
    ) -> Self:
        """Add layers up to the sites of a space; see ``summed``."""
        counts = [len(space.choices[site.name]) for site in space.sites]
        return cls.summed(space.sites, counts, layers, windows)

    @classmethod
    def summed(
        cls,
        sites: Sequence[Site],
        counts: Sequence[int],
        layers: Mapping[Layer, LayerSlopes],
        windows: Sequence[int],
    ) -> Self:
        """Add layers up to sites.

        Args:
            sites: The sites.
            counts: How many choices each has.
            layers: Slopes of the layers of free sites, a column a choice of the site.
            windows: On which they were taken.
        """
        shape = (4, len(sites), max(counts))
        table = np.full(shape, np.inf, dtype=np.float32)
        draws = 0
        for row, (site, count) in enumerate(zip(sites, counts, strict=True)):
            table[:, row, :count] = 0
            found = [layers[layer] for layer in site.layers if layer in layers]
            if not found:
                continue
            kl = torch.stack([one.kl.double() for one in found]).sum(0)
            score = torch.stack([one.score.double() for one in found]).sum(0)
            table[0, row, :count] = kl.mean(0).numpy()
            if len(kl) > 1:
                table[1, row, :count] = (kl.std(0) / len(kl) ** 0.5).numpy()
            if draws := len(score):
                table[2, row, :count] = (score.square().mean(0) / 2).numpy()
            if all(len(one.crossed) for one in found):
                crossed = torch.stack([one.crossed for one in found]).sum(0)
                table[3, row, :count] = crossed.numpy()
        slope, error = table[:2]
        fits = np.isfinite(slope)
        kinds = [kind_of(site.name) for site in sites]
        drawn, pairs = (np.where(fits, one, 0).astype(float) for one in table[2:])
        curvature = np.where(fits, steadied(drawn, pairs, kinds, draws), np.inf)
        return cls(slope, error, curvature.astype(np.float32), tuple(windows))

    def joined(self, other: Self) -> Self:
        """Average with what other windows say of the same policy."""
        counts = np.array([len(self.windows), len(other.windows)])
        share, rest = (counts / counts.sum()).astype(np.float32)

        error = np.hypot(self.error * share, other.error * rest)
        return replace(
            self,
            slope=self.slope * share + other.slope * rest,
            error=error,
            curvature=self.curvature * share + other.curvature * rest,
            windows=(*self.windows, *other.windows),
        )

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
