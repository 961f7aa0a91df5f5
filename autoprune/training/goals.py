"""What training is to prune, layer by layer, where it says what goes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.masks import kept_by_pattern, pruned_count, smallest
from autoprune.compression.parameters import keep_of
from autoprune.compression.storage import BITMAP, Storage
from autoprune.errors import ModelError
from autoprune.sites import Cut, Layer
from autoprune.training.choosing import flat_scores

UNITS = "units"
"""Pattern of zeros that go with a channel, head or filter as a whole."""


@dataclass(frozen=True, slots=True)
class Goal:
    """How a matrix is to be pruned at the end.

    Attributes:
        pruned: So many weights go, or units.
        pattern: ``N:M`` if weights go in groups of M columns, ``units``, or None if
            from anywhere.
    """

    pruned: int
    pattern: str | None = None

    @classmethod
    def of(cls, layer: Layer, storage: Storage) -> "Goal | None":
        """Read it from what a layer is to store; None if only a method can prune so.

        That is to tiles, in permuted columns, or with more stored than weights and
        mask.
        """
        more = storage.hidden, storage.bits, storage.low_rank
        if more != (None, None, None) or storage.permuted or storage.bias:
            return None
        if storage.units is not None:
            cut = layer.cut  # not that of a residual stream
            if not cut or storage.kept * cut.units != layer.numel * storage.units:
                return None
            return cls(cut.units - storage.units, UNITS)
        if storage.mask == BITMAP:
            return cls(storage.numel - storage.kept)
        if storage.mask is not None and ":" in storage.mask:
            return cls(storage.numel - storage.kept, storage.mask)
        return None


def prune_towards(
    scores: Float[Tensor, "out ..."], goal: Goal, share: float = 1.0
) -> Bool[Tensor, "out ..."]:
    """Mark the smallest scores on the way to a goal: ``round(share * pruned)`` of them.

    Of an ``N:M`` pattern only those are marked that may go at its end.

    Example:
        >>> import torch
        >>> prune_towards(torch.tensor([[1.0, 2.0, 8.0, 9.0]]), Goal(2, "1:2")).tolist()
        [[True, False, True, False]]
    """
    flat = flat_scores("a parameter", scores).view(len(scores), -1)
    if goal.pattern is not None:
        flat = flat.masked_fill(kept_by_pattern(flat, goal.pattern), math.inf)
    count = pruned_count(goal.pruned, share)
    return smallest(flat.view(1, -1), count).view(scores.shape).to(scores.device)


def by_unit(
    cut: Cut, values: Float[Tensor, "out in"] | Bool[Tensor, "out in"]
) -> Tensor:
    """Lay out a matrix as ``[units, values of a unit]``."""
    lines = values if cut.axis == "rows" else values.t()
    return lines.reshape(cut.units, -1)


def structures(
    layers: Sequence[Layer],
) -> dict[tuple[int | None, str], list[Layer]]:
    """Group the layers of each structure: by block and kind of unit.

    Raises:
        ModelError: If a layer is part of none, or a structure lacks the layers that
            make its units or those that take them.
    """
    found: dict[tuple[int | None, str], list[Layer]] = {}
    for layer in layers:
        if layer.cut is None:
            raise ModelError(
                f"the layer {layer.name!r} has no units, such as channels or heads. "
                "Leave it out, or prune weights."
            )
        found.setdefault((layer.block, layer.cut.kind), []).append(layer)
    for parts in found.values():
        axes = {layer.cut.axis for layer in parts if layer.cut}
        if axes != {"rows", "columns"}:
            raise ModelError(
                f"{parts[0].name!r} shares its units with layers that are not named: "
                "some make them and others take them. Name all layers of a structure."
            )
    return found


def check_goals(goals: Mapping[Layer, Goal]) -> None:
    """See that layers can be pruned to their goals.

    Raises:
        ModelError: If groups do not divide a layer, or a structure is not whole or has
            several goals.
    """
    units = {la: goal for la, goal in goals.items() if goal.pattern == UNITS}
    for parts in structures(list(units)).values():
        if len({goals[layer].pruned for layer in parts}) > 1:
            raise ModelError(
                f"the layers of {parts[0].name!r} and its structure are to lose "
                "different numbers of units. Give all of them the same."
            )
    for layer, goal in goals.items():
        if goal.pattern not in (None, UNITS):
            _, of = keep_of(goal.pattern)
            if layer.shape[1] % of:
                raise ModelError(
                    f"the layer {layer.name!r} has {layer.shape[1]} columns, which the "
                    f"groups of {goal.pattern} do not divide. Leave it out, or take "
                    "another pattern."
                )
