"""OWL and AlphaPruning, rivals of the search benchmark: zeros a block by a formula.

Both give every block a ratio of zeros and every layer of the block the same. Here the
ratio goes to the nearest level of the plan's space, and a few layers a level on, until
the budget is met as all others meet it.
"""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoprune.evaluation.workbench import Workbench
from autoprune.models.blocks import BlockRunner
from autoprune.models.statistics import Gathering
from autoprune.policy import Layer, Policy
from autoprune.searching.budget import prices_of
from autoprune.searching.plan import Plan

MULTIPLE, BAND = 5.0, 0.08
"""OWL's M and lambda: the best of the paper for unstructured zeros."""

EPSILON = 0.3
"""AlphaPruning's, the upper end of the 0.2 to 0.3 that it uses."""

BINS = 100


def owl(plan: Plan, target: float) -> Policy:
    """Prune blocks with more outliers less.

    Written from Yin et al., "Outlier Weighed Layerwise Sparsity" (arXiv:2310.05175), as
    its code does it, block by block: the share of Wanda scores above ``MULTIPLE`` times
    the block's mean, mapped to a band of densities ``2 * BAND`` wide.

    Args:
        plan: Of a space of sparsities, with a budget on them.
        target: Zeros over weights in the blocks.
    """
    shares = _outlier_shares(plan.bench)
    density = 2 * BAND * (shares - shares.min()) / np.ptp(shares)
    return _on_levels(plan, target - (density - density.mean()))


def alpha_pruning(plan: Plan, target: float) -> Policy:
    """Prune blocks whose spectra have lighter tails more; needs no text.

    Written from Lu et al., "AlphaPruning" (arXiv:2410.10912), as its code does it: the
    mean power-law exponent of a block's spectra, mapped to ``1 - EPSILON`` to
    ``1 + EPSILON`` and scaled so that all blocks together have the target.

    Args:
        plan: Of a space of sparsities, with a budget on them.
        target: Zeros over weights in the blocks.
    """
    blocks = _blocks(plan.bench)
    alphas = np.array(
        [
            np.mean([exponent(_spectrum(plan.bench, layer)) for layer in layers])
            for layers in blocks
        ]
    )
    numel = np.array([sum(layer.numel for layer in layers) for layers in blocks])
    ratios = 1 - EPSILON + 2 * EPSILON * (alphas - alphas.min()) / np.ptp(alphas)
    return _on_levels(plan, ratios * target * numel.sum() / (numel @ ratios))


def exponent(spectrum: NDArray[np.float64]) -> float:
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


def _spectrum(bench: Workbench, layer: Layer) -> NDArray[np.float64]:
    weight = bench.stitched.dense_weight(layer).float()
    values = torch.linalg.svdvals(weight).square()
    return np.sort(values.numpy().astype(np.float64))


def _outlier_shares(bench: Workbench) -> NDArray[np.float64]:
    """Give each block's share of outliers among its Wanda scores, on dense inputs."""
    bench.stitched.restore()
    ids = bench.splits["statistics"].ids
    runner = BlockRunner(bench.stitched.model, bench.inventory, ids)
    hidden, shares = runner.start(), []
    for block, layers in enumerate(_blocks(bench)):
        sums = {str(la.input): Gathering({"input_norm"}, la.shape[1]) for la in layers}
        hidden = runner.collect(block, hidden, partial(_add, sums), inputs=sums)
        scores = torch.cat(
            [_wanda(bench, layer, sums[str(layer.input)]) for layer in layers]
        )
        shares.append(float((scores > MULTIPLE * scores.mean()).double().mean()))
    return np.array(shares)


def _add(sums: dict[str, Gathering], name: str, inputs: Tensor) -> None:
    sums[name].add(inputs)


def _wanda(bench: Workbench, layer: Layer, gathered: Gathering) -> Tensor:
    squares = gathered.result().square_sum
    assert squares is not None
    return (bench.stitched.dense_weight(layer).float().abs() * squares.sqrt()).flatten()


def _blocks(bench: Workbench) -> list[list[Layer]]:
    """List the layers of every block."""
    count = len(bench.inventory.blocks)
    return [[la for la in bench.layers if la.block == block] for block in range(count)]


def _on_levels(plan: Plan, ratios: NDArray[np.float64]) -> Policy:
    """Take each site's level nearest to its block's ratio, and meet the budget."""
    problem, projection = plan.problem, plan.problem.projection
    assert projection is not None
    sites = problem.space.sites
    numel = np.array([site.numel for site in sites])
    kept = prices_of("sparsity", problem.prices).padded(problem.space)
    zeros = 1 - kept / numel[:, None]
    blocks = [site.layers[0].block for site in sites]
    wanted = np.array([0.0 if block is None else ratios[block] for block in blocks])
    nearest = np.abs(zeros - wanted[:, None]).argmin(axis=1)
    return problem.space.at(projection.fit(nearest, np.random.default_rng(0)))
