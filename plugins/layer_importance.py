"""How many zeros every layer gets, by what its inputs tell of its worth."""

from collections.abc import Mapping
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from autoprune.compression.sizes import Sizes
from autoprune.evaluation.dense_inputs import dense_statistics
from autoprune.evaluation.sensitivity import output_errors
from autoprune.evaluation.workbench import Workbench
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Action, Layer
from autoprune.searching.formulas import Formula, Ladder, band

Floats = NDArray[np.float64]

POWER_STEPS = 100
"""Most multiplications in which the largest eigenvalue is looked for."""

MULTIPLE, BAND = 5.0, 0.08
"""OWL's M and lambda: the best of the paper for unstructured zeros."""


def largest_eigenvalue(hessian: Float[Tensor, "in in"]) -> float:
    """Find the largest eigenvalue of a positive matrix, by powers of it.

    Begins with the column of the largest diagonal entry, so no chance is involved.
    """
    vector = hessian[:, int(hessian.diagonal().argmax())].clone()
    found = 0.0
    for _ in range(POWER_STEPS):
        size = float(vector.norm())
        if size == 0:
            return 0.0
        vector = hessian @ (vector / size)
        last, found = found, float(vector.norm())
        if abs(found - last) <= 1e-6 * found:
            break
    return found


def logarithms(positive: Float[np.ndarray, " layers"]) -> Floats:
    """Take logarithms; what is zero counts as the least that is not."""
    least = positive[positive > 0].min(initial=1.0)
    logarithms: Floats = np.log(np.maximum(positive, least))
    return logarithms


class Owl(Formula):
    """Prune blocks with more outliers less.

    The share of a block's Wanda scores above ``MULTIPLE`` times their mean, mapped to a
    band of densities ``2 * BAND`` wide. As the authors' code does it, block by block.
    How we differ: a block counts by its weights, where the authors take all as equal.
    """

    name = "owl"
    reference = "Yin et al. 2023, arXiv:2310.05175"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios; takes a pass over the blocks."""
        shares = []
        found = dense_statistics(bench, ladder.layers, "input_norm")
        for _, own in groupby(found, key=lambda pair: pair[0].block):
            scores = torch.cat([_wanda(bench, *pair) for pair in own])
            outliers = scores > MULTIPLE * scores.mean()
            shares.append(float(outliers.double().mean()))
        numel, spread = ladder.block_numel, float(np.ptp(shares))
        density = 2 * BAND * (np.array(shares) - min(shares)) / (spread or 1.0)
        ratios = ladder.target - (density - numel @ density / numel.sum())
        return {self.name: ladder.over_blocks(ratios)}


def _wanda(bench: Workbench, layer: Layer, known: InputStatistics) -> Tensor:
    assert known.square_sum is not None
    weight = bench.stitched.dense_weight(layer).float().abs()
    return (weight * known.square_sum.sqrt()).flatten()


class HessianTrace(Formula):
    """Prune layers less whose outputs feel a change of a weight more.

    Importance is the mean of the Hessian's diagonal times the mean square of a weight:
    what is lost, on average, with a weight. How we differ: HAWQ-V2's Hessian is that of
    the loss, ours is that of the layer's outputs; logarithms are taken, as layers
    differ by magnitudes; the map to ratios is AlphaPruning's.
    """

    name = "hessian_trace"
    reference = "Dong et al. 2019, HAWQ-V2, arXiv:1911.03852"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios; takes a pass over the blocks."""
        means = {}
        for layer, known in dense_statistics(bench, ladder.layers, "input_norm"):
            assert known.square_sum is not None
            means[layer] = float(known.square_sum.mean())
        return {self.name: _by_worth(ladder, bench, means)}


class HessianEigenvalue(Formula):
    """Prune layers less whose outputs have a direction that feels changes most.

    As ``hessian_trace``, with the largest eigenvalue of the Hessian in the place of the
    mean. How we differ: as there.
    """

    name = "hessian_eigenvalue"
    reference = "Dong et al. 2019, HAWQ, arXiv:1905.03696"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios; takes a pass over the blocks, with Hessians."""
        largest: dict[str, float] = {}  # by input, which several layers may read
        for layer, known in dense_statistics(bench, ladder.layers, "hessian"):
            if str(layer.input) not in largest:
                assert known.hessian is not None
                largest[str(layer.input)] = largest_eigenvalue(known.hessian)
        values = {layer: largest[str(layer.input)] for layer in ladder.layers}
        return {self.name: _by_worth(ladder, bench, values)}


def _by_worth(
    ladder: Ladder, bench: Workbench, values: Mapping[Layer, float]
) -> Floats:
    """Multiply what inputs tell with the mean square of a weight, and map the logs."""
    worth = []
    for layer in ladder.layers:
        sizes = Sizes.of(bench.stitched.dense_weight(layer), layer.name)
        worth.append(values[layer] * sizes.mean_square)
    return band(logarithms(np.array(worth)), ladder.numel, ladder.target)


class Sensitivity(Formula):
    """Prune layers less whose outputs change more at the level next to the target.

    Importance is the relative error of a layer's outputs, as measured on dense inputs
    with the variants themselves. How we differ: ratios fall in proportion to it within
    AlphaPruning's band, as errors of layers differ too much to divide by them.
    """

    name = "sensitivity"
    reference = "SparseGPT's error of a layer, arXiv:2301.00774, Eq. 1"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios; makes a variant a layer, and takes two passes."""
        wanted: dict[Layer, list[Action]] = {}
        space = ladder.problem.space
        zeros = np.where(ladder.zeros > 0, ladder.zeros, np.inf)
        for site, own in zip(space.sites, zeros, strict=True):
            if np.isfinite(own).any():
                level = int(np.abs(own - ladder.target).argmin())
                action = space.choices[site.name][level]
                wanted.update((layer, [action]) for layer in site.layers)
        errors = output_errors(bench.bank(), wanted)
        importance = np.array([errors[layer][0] for layer in ladder.layers])
        return {self.name: band(importance, ladder.numel, ladder.target)}


@hookimpl
def register_formulas() -> list[Formula]:
    """Return the formulas."""
    return [
        Owl(),
        HessianTrace(),
        HessianEigenvalue(),
        Sensitivity(),
    ]
