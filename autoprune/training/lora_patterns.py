"""When LoRAPrune prunes, and the units of structures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.parameters import keep_of
from autoprune.errors import ConfigError, ModelError
from autoprune.sites import Cut, Layer
from autoprune.training.choosing import UNITS, Goal
from autoprune.training.ramps import Ramp


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPruneSettings:
    """When and how weights are pruned.

    Attributes:
        ramp: Share of the goals at each step of the optimizer, ending at 1 within the
            training.
        decay: How much of the importance known before stays at a step, from 0 to below
            1 (the paper's lambda).

    Raises:
        ConfigError: If a setting is out of its range.
    """

    ramp: Ramp = field(default_factory=lambda: Ramp(final=1.0))
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(
                f"decay of importance is from 0 to below 1, found {self.decay}"
            )
        if self.ramp.final != 1.0:
            raise ConfigError(
                f"the ramp of shares of a goal ends at 1, found {self.ramp.final}"
            )


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
