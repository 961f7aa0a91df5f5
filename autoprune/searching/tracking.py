"""Follows slopes from incumbent to incumbent, as far as each gradient can be trusted.

A gradient on a few windows is noisy, and so is what the cheapest of its slopes promise.
What was known at the incumbent before helps, but moves away with every step. A Kalman
filter (Kalman 1960) weighs the two: how far slopes have moved is told by how much more
they differ from what was known than the noise of the windows explains. One gain serves
all sites of a kind, as sites differ more by kind than within.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from autoprune.searching.slopes import SiteSlopes

Seen = tuple[Int[np.ndarray, " sites"], SiteSlopes]
"""Choices of an incumbent, and the slopes there."""


def tracked(
    seen: Sequence[Seen], kinds: Sequence[str], reach: int
) -> Float[np.ndarray, "sites choices"]:
    """Estimate the slopes at the last of some incumbents.

    Args:
        seen: Incumbents in their order, at least one.
        kinds: Kind of each site.
        reach: Noise is told by choices at most so many positions from those that stood,
            which steps may take; those further off have slopes of another size.

    Returns:
        Estimates; inf where there is no choice.
    """
    names = np.array(kinds)
    rows = np.arange(len(names))
    estimate: NDArray[np.float64] = np.zeros(seen[0][1].slope.shape)
    for turn, (now, found) in enumerate(seen):
        estimate -= estimate[rows, now][:, None]
        fits = np.isfinite(found.slope)
        fresh = np.where(fits, found.slope, 0).astype(float)
        noise = np.where(fits, found.error, 0).astype(float) ** 2
        near = _near(now, fits, reach)
        for kind in set(kinds):
            own = names == kind
            at = near & own[:, None]
            if not at.any():
                continue
            doubt = noise[at].mean()
            moved = max(float(((fresh - estimate)[at] ** 2).mean() - doubt), 0.0)
            known = turn > 0 and doubt > 0
            gain = moved / (moved + doubt) if known else 1.0
            estimate[own] += gain * (fresh - estimate)[own]
    return np.where(fits, estimate, np.inf)


def _near(
    now: Int[np.ndarray, " sites"], fits: Bool[np.ndarray, "sites choices"], reach: int
) -> Bool[np.ndarray, "sites choices"]:
    apart = np.abs(np.arange(fits.shape[1]) - now[:, None])
    near: NDArray[np.bool_] = fits & (apart > 0) & (apart <= reach)
    return near
