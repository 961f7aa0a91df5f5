"""Corrects an additive model by what trials have shown: one multiplier a site."""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

LEAST = 0.02
"""The smallest multiplier, as a share of their mean: no site is ever free."""

NOISES = np.geomspace(0.01, 0.3, 8)
"""What an additive model may be wrong by, as a share of a trial's value."""

SPREADS = np.geomspace(0.02, 10.0, 16)
"""How far multipliers may lie from their common one."""

EXPECTED_SPREAD = 0.3
"""Of them, before a trial is known; in its logarithm give or take 1."""


def fit_multipliers(
    features: Float[np.ndarray, "trials sites"], values: Float[np.ndarray, " trials"]
) -> Float[np.ndarray, " sites"]:
    """Fit what each site's sensitivity counts for in the values of trials.

    Ridge regression with a free constant, towards one common multiplier, as strongly as
    is most likely of what was measured (evidence: MacKay 1992, Bayesian Interpolation).
    A trial counts by the inverse of its value: the error that matters is a
    share, and good policies are what is asked about.

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
    shift = _ridge(scaled / values.min() * common, rest / values.min())
    return np.maximum(1 + shift, LEAST)


def _ridge(
    features: NDArray[np.float64], rest: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Fit by ridge regression, with the spreads of noise and answer most likely.

    Args:
        features: What each site adds to a trial, as a share of its value; without a
            common part, which the constant takes.
        rest: What is to be explained of each.
    """
    values, vectors = np.linalg.eigh(features @ features.T)
    values = np.maximum(values, 0)
    if values[-1] <= 0:
        return np.zeros(features.shape[1])
    turned = vectors.T @ rest

    def misfit(noise: float, spread: float) -> float:
        variance = spread**2 * values + noise**2
        unlikely = np.log(variance).sum() + (turned**2 / variance).sum()
        free = 2 * np.log(noise)  # of the constant's direction, in which all is zero
        return float(unlikely - free + np.log(spread / EXPECTED_SPREAD) ** 2)

    pairs = [(noise, spread) for noise in NOISES for spread in SPREADS]
    noise, spread = min(pairs, key=lambda pair: misfit(*pair))
    shrunk = spread**2 / (spread**2 * values + noise**2)
    shift: NDArray[np.float64] = features.T @ (vectors @ (turned * shrunk))
    return shift
