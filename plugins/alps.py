"""ALPS: the mask by alternating directions, then the best weights on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.admm import ScaledInputs, keep_largest, scale_inputs
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value

FIRST_PENALTY = 0.1
"""Weight of the distance between weights and pruned weights, on unit inputs."""

MOST_STEPS = 300
"""Turns between weights and mask after which a mask that still moves is taken."""

LOOK_EVERY = 3
"""Turns after which the mask is compared with the one before."""

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Changes of the mask, over the weights kept, and how much the penalty grows then."""

GRADIENT_STEPS = 10
"""Conjugate gradient steps for the weights on the mask."""

ROUNDING = 64
"""Size of a residual that rounding leaves, in units of the first one's last digit."""


class Alps(CompressionMethod):
    """Let mask and weights find each other, ever more tightly coupled.

    Each turn solves for unpruned weights that lie near the pruned ones, prunes them to
    the largest, and moves multipliers by what lies between; the coupling grows while
    the mask still changes. One eigendecomposition serves every coupling. On the mask
    that stands, conjugate gradients find the weights. All weights of a layer compete,
    or those of a group of the pattern.

    How we differ: conjugate gradients take a step of its own length for every row, as
    rows do not depend on each other.
    """

    name = "alps"
    reference = "Meng et al. 2024, arXiv:2406.07831, Algorithms 1 and 2"
    needs = frozenset({"hessian"})
    parameters = (
        preconditions.SPARSITY,
        preconditions.PATTERN,
        preconditions.DAMPING,
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
        """Make variants for every setting; those of equal damping share a basis."""
        hessian = preconditions.finite_hessian(sources, statistics)
        names = [source.layer.name for source in sources]
        weights = [preconditions.finite_weight(source) for source in sources]
        bases = {
            damping: _Basis.of(scale_inputs(hessian, damping=damping, names=names))
            for damping in dict.fromkeys(one["damping"] for one in settings)
        }
        return [
            [
                _prune(source.variant, weight, bases[one["damping"]], one)
                for one in settings
            ]
            for source, weight in zip(sources, weights, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Basis:
    """Eigenvectors of the scaled Hessian, as columns, and its eigenvalues."""

    inputs: ScaledInputs
    vectors: Float[Tensor, "in in"]
    values: Float[Tensor, " in"]

    @classmethod
    def of(cls, inputs: ScaledInputs) -> "_Basis":
        values, vectors = torch.linalg.eigh(inputs.hessian.double())
        # Rounding leaves a singular Hessian with eigenvalues just below zero.
        return cls(inputs, vectors.float(), values.clamp(min=0.0).float())

    def solve(
        self, right: Float[Tensor, "out in"], penalty: float
    ) -> Float[Tensor, "out in"]:
        """Divide by the Hessian plus a penalty on its diagonal."""
        return (right @ self.vectors / (self.values + penalty)) @ self.vectors.T


def _prune(
    variant: Variant, weight: Float[Tensor, "out in"], basis: _Basis, settings: Settings
) -> Variant:
    inputs = basis.inputs
    dense = inputs.enter(weight)
    aim = dense @ inputs.hessian
    pruned, kept = _find_mask(dense, aim, basis, settings)
    pruned = _fit(pruned, kept, aim, inputs.hessian)
    return variant.pruned(inputs.leave(pruned), kept, pattern=settings["pattern"])


def _find_mask(
    dense: Float[Tensor, "out in"],
    aim: Float[Tensor, "out in"],
    basis: _Basis,
    settings: Settings,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Alternate until the mask stands."""
    kept = before = keep_largest(dense, settings)
    pruned, multipliers = dense * kept, torch.zeros_like(dense)
    penalty, count = FIRST_PENALTY, int(kept.sum())
    for step in range(1, MOST_STEPS + 1):
        weight = basis.solve(aim + penalty * pruned - multipliers, penalty)
        moved = weight + multipliers / penalty
        kept = keep_largest(moved, settings)
        pruned = moved * kept
        multipliers += penalty * (weight - pruned)
        if step % LOOK_EVERY:
            continue
        changed = int((kept ^ before).sum())
        if not changed:
            break
        penalty *= next(grow for part, grow in GROWTH if changed > part * count)
        before = kept
    return pruned, kept


def _fit(
    weight: Float[Tensor, "out in"],
    kept: Bool[Tensor, "out in"],
    aim: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """Bring weights near the least output error on their mask."""
    tiny = torch.finfo(weight.dtype).tiny
    rest = (aim - weight @ hessian) * kept
    way, size = rest, rest.square().sum(1, keepdim=True)
    # A row is done where rounding is all that is left: of a singular Hessian it lies
    # where nothing is curved, and a step along it would have no end.
    least = (ROUNDING * torch.finfo(weight.dtype).eps) ** 2 * size
    going = torch.ones_like(size, dtype=torch.bool)
    for _ in range(GRADIENT_STEPS):
        curved = (way @ hessian) * kept
        bend = (way * curved).sum(1, keepdim=True)
        going &= (size > least) & (bend > 0)
        length = torch.where(going, size / bend, 0.0)
        weight = weight + length * way
        rest = rest - length * curved
        now = rest.square().sum(1, keepdim=True)
        way = rest + now / size.clamp(min=tiny) * way
        size = now
    return weight


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Alps()]
