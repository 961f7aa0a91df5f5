"""Corrects an additive model by what trials have shown: one multiplier a site."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

LEAST = 0.02
"""The smallest multiplier, as a share of their mean: no site is ever free."""


def fit_multipliers(
    features: Float[np.ndarray, "trials sites"], values: Float[np.ndarray, " trials"]
) -> Float[np.ndarray, " sites"]:
    """Fit what each site's sensitivity counts for in the values of trials.

    Ridge regression with a free constant, towards one common multiplier. A trial
    counts by the inverse of its value: the error that matters is a share, and good
    policies are what is asked about.

    Args:
        features: The sensitivity of each site's choice, at least 0.
        values: The trials' KL, more than 0.

    Returns:
        Multipliers of mean 1 or so, none below ``LEAST``; all 1 where nothing is to be
        learned.
    """
    total = features.sum(axis=1)
    if not (total > 0).all() or not (values > 0).all():
        return np.ones(features.shape[1])
    # Good trials lie too close together to tell a constant from a common multiplier:
    # that is taken through the origin, where a dense model has no KL.
    common = float((values / total).mean())
    weights = values.min() / values
    rest = (values - common * total) * weights
    scaled = features * weights[:, None]
    basis = weights / np.linalg.norm(weights)
    rest -= basis * (basis @ rest)
    scaled -= np.outer(basis, basis @ scaled)
    return np.maximum(1 + _ridge(scaled, rest) / common, LEAST)


def _ridge(
    features: NDArray[np.float64], rest: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Fit by ridge regression, with the penalty that leaves the least out of sample."""
    values, vectors = np.linalg.eigh(features @ features.T)
    values = np.maximum(values, 0)
    if values[-1] <= 0:
        return np.zeros(features.shape[1])
    turned = vectors.T @ rest

    def dual(penalty: float) -> tuple[float, NDArray[np.float64]]:
        shrunk = 1 / (values + penalty)
        inverse = np.einsum("ik,k,ik->i", vectors, shrunk, vectors)
        weights: NDArray[np.float64] = vectors @ (turned * shrunk)
        return float(np.square(weights / inverse).mean()), weights

    penalties: Sequence[float] = [values[-1] * 4.0**-power for power in range(2, 14)]
    _, weights = min((dual(penalty) for penalty in penalties), key=lambda one: one[0])
    shift: NDArray[np.float64] = features.T @ weights
    return shift
