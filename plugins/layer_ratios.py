"""How many zeros every layer gets, by its shape, its depth or its weights."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from autoprune.compression.sizes import Sizes
from autoprune.evaluation.workbench import Workbench
from autoprune.hookspecs import hookimpl
from autoprune.searching.formulas import Formula, Ladder, band

Floats = NDArray[np.float64]

LEAST_SHARE = 0.25
"""Share of the mean density that the global ranking by size leaves every layer."""

SLOPES = (1 / 3, 2 / 3)
"""Of the steepest progression that ATP allows; it searches over them."""

BINS = 100
"""Bins of the histogram in which AlphaPruning looks for the peak of a spectrum."""


def pruned_shares(
    scores: Sequence[Float[np.ndarray, " _"]],
    counts: Sequence[Float[np.ndarray, " _"]],
    target: float,
    *,
    most: float = 1.0,
) -> Float[np.ndarray, " layers"]:
    """Rank the weights of all layers together, and tell what share each layer loses.

    Args:
        scores: Of the weights of each layer, ascending.
        counts: How many weights have each score.
        target: Share of all weights to remove; at most ``most``.
        most: Largest share that a layer may lose.
    """
    numel = np.array([own.sum() for own in counts])
    offered = [
        np.diff(np.minimum(np.cumsum(own), most * own.sum()), prepend=0.0)
        for own in counts
    ]
    owner = np.repeat(np.arange(len(scores)), [len(own) for own in scores])
    order = np.argsort(np.concatenate(scores), kind="stable")
    taken = np.concatenate(offered)[order]
    before = np.cumsum(taken) - taken
    taken = np.clip(target * numel.sum() - before, 0.0, taken)
    removed = np.bincount(owner[order], weights=taken, minlength=len(scores))
    shares: Floats = removed / numel
    return shares


def capped_densities(
    wanted: Float[np.ndarray, " layers"],
    numel: Float[np.ndarray, " layers"],
    density: float,
) -> Float[np.ndarray, " layers"]:
    """Scale densities to a mean over all weights; those that would pass 1 are dense.

    Args:
        wanted: Positive densities, known up to a factor.
        numel: Weights of each layer.
        density: The mean, in [0, 1].
    """
    full = np.zeros(len(wanted), dtype=bool)
    while not full.all():
        left = density * numel.sum() - numel[full].sum()
        scale = left / (wanted[~full] @ numel[~full])
        over = ~full & (scale * wanted > 1)
        if not over.any():
            return np.where(full, 1.0, scale * wanted)
        full |= over
    return np.ones(len(wanted))


def exponent(spectrum: Float[np.ndarray, " values"]) -> float:
    """Fit a power law to the tail of a spectrum, by Hill's estimator.

    Of the tails that begin up to half above the peak of the histogram of logarithms,
    the one nearest to its fit by Kolmogorov and Smirnov counts. The tail's lower end is
    compared to a logarithm, a slip of the authors' that all but lifts that bound.

    Args:
        spectrum: Squared singular values, ascending and positive.
    """
    logs, count = np.log(spectrum), len(spectrum)
    counts, edges = np.histogram(np.log10(spectrum), BINS)
    peak = 10 ** edges[counts.argmax()]
    within = (spectrum >= np.log10(0.95 * peak)) & (spectrum <= 1.5 * peak)
    best, nearest = 0.0, np.inf
    for first in np.flatnonzero(within[:-1]):
        size = count - first
        alpha = 1 + size / (logs[first:] - logs[first]).sum()
        fitted = 1 - (spectrum[first:] / spectrum[first]) ** (1 - alpha)
        distance = np.abs(fitted - np.arange(size) / size).max()
        if distance < nearest:
            best, nearest = float(alpha), distance
    return best


def sizes_of(ladder: Ladder, bench: Workbench) -> list[Sizes]:
    """Count the sizes of all layers."""
    weight = bench.stitched.dense_weight
    return [Sizes.of(weight(layer), layer.name) for layer in ladder.layers]


class ErdosRenyiKernel(Formula):
    """Keep weights in proportion to a layer's inputs plus outputs.

    A layer's density is proportional to ``(out + in) / (out * in)``; layers that would
    pass 1 stay dense, and the others share what is left.
    """

    name = "erk"
    reference = "Evci et al. 2019, RigL, arXiv:1911.11134, Sec. 3"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios; needs no weights."""
        wanted = np.array([sum(la.shape) / la.numel for la in ladder.layers])
        kept = capped_densities(wanted, ladder.numel, 1 - ladder.target)
        return {self.name: 1 - kept}


class Lamp(Formula):
    """Rank all weights by their square over the squares of none smaller in the layer.

    The largest weight of a layer scores 1, so that none is emptied. How we differ:
    weights that are equal in bfloat16 share a score, where the paper ranks them by
    position: a layer is emptied only if all its weights are equal.
    """

    name = "lamp"
    reference = "Lee et al. 2020, arXiv:2010.07611"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the share of its weights that each layer loses."""
        sizes = sizes_of(ladder, bench)
        scores = [one.lamp for one in sizes]
        counts = [one.counts for one in sizes]
        return {self.name: pruned_shares(scores, counts, ladder.target)}


class GlobalMagnitude(Formula):
    """Rank the weights of all layers by size.

    How we differ: a layer keeps at least ``LEAST_SHARE`` of the mean density, as the
    plain ranking may empty layers of small weights.
    """

    name = "global_magnitude"
    reference = "Han et al. 2015, arXiv:1506.02626, Sec. 3, over all layers at once"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the share of its weights that each layer loses."""
        sizes = sizes_of(ladder, bench)
        values, counts = [s.values for s in sizes], [s.counts for s in sizes]
        most = 1 - LEAST_SHARE * (1 - ladder.target)
        return {self.name: pruned_shares(values, counts, ladder.target, most=most)}


class ArithmeticProgression(Formula):
    """Let ratios grow with depth by the same step from block to block.

    The mean is the target; the step is a share of the largest that keeps every ratio
    between 0 and 1. How we differ: the paper tries several steps; here are two.
    """

    name = "atp"
    reference = "Huang et al. 2025, arXiv:2502.14770"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios of both slopes; needs no weights."""
        numel, target = ladder.block_numel, ladder.target
        depth = np.array(list(ladder.blocks), dtype=np.float64)
        depth -= numel @ depth / numel.sum()
        steepest = 0.0
        if len(numel) > 1:
            steepest = min(target / -depth[0], (1 - target) / depth[-1])
        return {
            f"{self.name} {slope:.2f}": ladder.over_blocks(
                target + slope * steepest * depth
            )
            for slope in SLOPES
        }


class WeightEntropy(Formula):
    """Prune layers more whose energy is in few weights.

    Importance is the entropy of the weights' shares of the squared norm, over that of
    equal shares. How we differ: entropies are taken of energy and not of a histogram,
    so that there are no bins to choose; the map to ratios is AlphaPruning's.
    """

    name = "entropy"
    reference = "Shannon 1948, A Mathematical Theory of Communication, Sec. 6"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios."""
        importance = np.array([one.entropy for one in sizes_of(ladder, bench)])
        return {self.name: band(importance, ladder.numel, ladder.target)}


class WeightNorm(Formula):
    """Prune layers most whose weights are smallest.

    Importance is the root of the mean square, that is the Frobenius norm over the root
    of the number of weights. How we differ: the map to ratios is AlphaPruning's.
    """

    name = "norm"
    reference = "Li et al. 2016, arXiv:1608.08710, Sec. 3, on whole layers"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios."""
        squares = np.array([one.mean_square for one in sizes_of(ladder, bench)])
        return {self.name: band(np.sqrt(squares), ladder.numel, ladder.target)}


class AlphaPruning(Formula):
    """Prune blocks more whose spectra have lighter tails.

    A block's mean power-law exponent, mapped to ``1 - EPSILON`` to ``1 + EPSILON`` and
    scaled so that all blocks together have the target. Decomposes every layer: of the
    formulas that need no text the one that takes longest.
    """

    name = "alpha_pruning"
    reference = "Lu et al. 2024, arXiv:2410.10912"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios."""
        weight = bench.stitched.dense_weight
        alphas = [exponent(_spectrum(weight(layer))) for layer in ladder.layers]
        means = [np.mean([alphas[at] for at in own]) for own in ladder.blocks.values()]
        ratios = band(-np.array(means), ladder.block_numel, ladder.target)
        return {self.name: ladder.over_blocks(ratios)}


def _spectrum(weight: Float[Tensor, "out in"]) -> Floats:
    """Give the squared singular values, ascending; zeros have no logarithm."""
    values = torch.linalg.svdvals(weight.float()).square().double().numpy()
    return np.sort(values[values > 0])


@hookimpl
def register_formulas() -> list[Formula]:
    """Return the formulas."""
    return [
        ErdosRenyiKernel(),
        Lamp(),
        GlobalMagnitude(),
        ArithmeticProgression(),
        WeightEntropy(),
        WeightNorm(),
        AlphaPruning(),
    ]
