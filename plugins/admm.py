"""ADMM pruning: weights and mask in turns, with one inverse for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.admm import keep_largest, scale_inputs
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value

STEPS = 20
"""Turns between weights and mask."""

MASK_STEPS = 15
"""Turns in which the mask is still chosen anew."""

PENALTY = 1.0
"""Weight of the distance between weights and pruned weights, on unit inputs."""


class Admm(CompressionMethod):
    """Find mask and weights in twenty turns of the alternating direction method.

    Inputs are scaled to unit norm, so that the first mask is a part of Wanda's. More is
    removed from turn to turn along a cubic ramp; the last five turns only fit the
    weights. All weights of a layer compete, or those of a group of the pattern.

    How we differ: in groups of a pattern the ramp removes whole weights, as many as
    the nearest number tells.
    """

    name = "admm"
    reference = "Boza 2024, arXiv:2401.02938"
    needs = frozenset({"hessian"})
    parameters = (
        preconditions.SPARSITY,
        preconditions.PATTERN,
        replace(preconditions.DAMPING, default=0.1),
    )

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters."""
        return preconditions.check_sparsity_or_pattern(self.name, super().check(params))

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        return preconditions.refuse_without_input(
            layer
        ) or preconditions.refuse_pruning(layer, previous, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return preconditions.pruned_storage(previous, settings)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting; those of equal damping share an inverse."""
        hessian = preconditions.finite_hessian(sources, statistics)
        names = [source.layer.name for source in sources]
        inputs = scale_inputs(hessian, damping=0.0, names=names)
        weights = [inputs.enter(preconditions.finite_weight(s)) for s in sources]
        solvers = {
            damping: _Ridge(inputs.hessian, damping)
            for damping in dict.fromkeys(one["damping"] for one in settings)
        }
        made: list[list[Variant]] = []
        for source, weight in zip(sources, weights, strict=True):
            variants = []
            for one in settings:
                found, kept = _alternate(weight, solvers[one["damping"]], one)
                pattern, scaled = one["pattern"], inputs.leave(found)
                variants.append(source.variant.pruned(scaled, kept, pattern=pattern))
            made.append(variants)
        return made


class _Ridge:
    """Least squares with a pull towards given weights, solved by one inverse."""

    def __init__(self, hessian: Float[Tensor, "in in"], damping: float) -> None:
        identity = torch.eye(len(hessian))
        self.hessian = hessian + damping * identity
        pulled = self.hessian + PENALTY * identity
        self.inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(pulled))


def _alternate(
    dense: Float[Tensor, "out in"], ridge: _Ridge, settings: Settings
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Give pruned weights and what is kept, both on scaled inputs."""
    aim = dense @ ridge.hessian
    weight, off = dense, torch.zeros_like(dense)
    kept = torch.ones(dense.shape, dtype=torch.bool)
    for step in range(STEPS):
        if step < MASK_STEPS:
            part = 1 - (1 - (step + 1) / MASK_STEPS) ** 3
            kept = keep_largest(weight + off, settings, part=part)
        pruned = (weight + off) * kept
        off = off + weight - pruned
        weight = (aim + PENALTY * (pruned - off)) @ ridge.inverse
    return (weight + off) * kept, kept


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Admm()]
