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
        asked: Trials that had been asked for when it was taken last.
    """

    slope: Table
    error: Table
    curvature: Table
    windows: tuple[int, ...]
    asked: int = -1

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

    @classmethod
    def pooled(cls, parts: Sequence[Self]) -> Self:
        """Put together what was taken in parts, as if it had been taken at once."""
        first, *others = parts
        if not others:
            return first
        counts = np.array([len(part.windows) for part in parts], dtype=np.float64)
        shares = (counts / counts.sum())[:, None, None]
        slopes = np.stack([part.slope for part in parts]).astype(np.float64)
        fits = np.isfinite(first.slope)
        slopes = np.where(fits, slopes, 0)
        mean = (slopes * shares).sum(0)
        within = np.stack([np.where(fits, part.error, 0) for part in parts])
        # Squares add up: those inside of each part, and those between their means.
        squares = (counts[:, None, None] * within) ** 2
        squares += counts[:, None, None] * (slopes - mean) ** 2
        error = np.sqrt(squares.sum(0)) / counts.sum()
        curvatures = np.stack([np.where(fits, part.curvature, 0) for part in parts])
        mean, error, curvature = (
            np.where(fits, one, np.inf).astype(np.float32)
            for one in (mean, error, (curvatures * shares).sum(0))
        )
        windows = tuple(window for part in parts for window in part.windows)
        return cls(mean, error, curvature, windows)

    def to_bytes(self) -> bytes:
        """Write them, for the ledger."""
        file = io.BytesIO()
        table = np.stack([self.slope, self.error, self.curvature])
        windows, asked = np.array(self.windows), np.array(self.asked)
        np.savez_compressed(file, table=table, windows=windows, asked=asked)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read them."""
        with np.load(io.BytesIO(data)) as found:
            slope, error, curvature = found["table"]
            asked = int(found["asked"]) if "asked" in found else -1  # of older ledgers
            windows = tuple(found["windows"].tolist())
            return cls(slope, error, curvature, windows, asked)
