"""What methods that alternate between a ridge problem and a mask have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.masks import kept_by_pattern, kept_by_sparsity
from autoprune.compression.method import Settings, keep_of
from autoprune.errors import MethodError


@dataclass(frozen=True, eq=False)
class ScaledInputs:
    """Inputs in units of their own norm: a weight then counts as much as it does.

    Attributes:
        hessian: With ones on the diagonal.
        scale: What each input is divided by, and its weights are multiplied by.
        dead: Inputs that were always zero; their weights go to zero.
    """

    hessian: Float[Tensor, "in in"]
    scale: Float[Tensor, " in"]
    dead: Bool[Tensor, " in"]

    def enter(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Give weights that go with the scaled inputs."""
        return (weight * self.scale).masked_fill_(self.dead, 0.0)

    def leave(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Give weights that go with the inputs as they were."""
        return weight / self.scale


def scale_inputs(
    hessian: Float[Tensor, "in in"], *, damping: float, names: Sequence[str]
) -> ScaledInputs:
    """Damp a Hessian and bring its diagonal to ones.

    Args:
        hessian: ``Xᵀ X``; never written to.
        damping: Added to the diagonal before, as a fraction of its mean.
        names: Layers that share the input, for messages.

    Raises:
        MethodError: If all inputs were zero; names the layers.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        raise MethodError(
            f"the inputs of {', '.join(names)} were zero for every token (the mean "
            f"diagonal of the Hessian is {mean:g}). Gather statistics from more text, "
            "or use a method without statistics here: magnitude, rtn."
        )
    dead = diagonal == 0
    damped = torch.where(dead, mean, diagonal) + damping * mean
    scale = damped.sqrt()
    scaled = hessian / scale / scale[:, None]
    scaled.diagonal().fill_(1.0)
    return ScaledInputs(scaled, scale, dead)


def keep_largest(
    weight: Float[Tensor, "out in"], settings: Settings, *, part: float = 1.0
) -> Bool[Tensor, "out in"]:
    """Mark the largest weights of a layer, or of every group of a pattern.

    Args:
        weight: Weights that go with scaled inputs.
        settings: ``sparsity`` of the layer, or ``pattern``.
        part: Fraction of what is to be removed in the end that is removed now.
    """
    if settings["pattern"] is None:
        return kept_by_sparsity(weight.abs(), part * settings["sparsity"], per="layer")
    keep, of = keep_of(settings["pattern"])
    removed = round(part * (of - keep))
    if not removed:
        return torch.ones(weight.shape, dtype=torch.bool)
    return kept_by_pattern(weight.abs(), f"{of - removed}:{of}")
