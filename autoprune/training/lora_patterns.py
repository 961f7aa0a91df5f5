"""What LoRAPrune prunes, and when: patterns, and the units of structures."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.parameters import keep_of
from autoprune.errors import ConfigError, MethodError, ModelError
from autoprune.sites import Cut, Layer
from autoprune.training.ramps import Ramp

UNSTRUCTURED, UNITS = "unstructured", "units"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPruneSettings:
    """What is pruned, and when.

    Attributes:
        ramp: Sparsity at each step of the optimizer; its end is within the training.
        pattern: ``unstructured``: weights of a layer compete; ``N:M``: N of every M
            consecutive columns stay at the end, of which the least important go first;
            ``units``: channels of an MLP and heads of an attention go as a whole.
        decay: How much of the importance known before stays at a step, from 0 to below
            1 (the paper's lambda).

    Raises:
        ConfigError: If a setting is out of its range, or the ramp does not end at the
            sparsity of the pattern.
    """

    ramp: Ramp = field(default_factory=Ramp)
    pattern: str = UNSTRUCTURED
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(
                f"decay of importance is from 0 to below 1, found {self.decay}"
            )
        if self.pattern in (UNSTRUCTURED, UNITS):
            return
        try:
            keep, of = keep_of(self.pattern)
        except MethodError as error:
            raise ConfigError(
                f"a pattern is {UNSTRUCTURED}, {UNITS} or N:M, found {self.pattern!r}"
            ) from error
        if abs(self.ramp.final - (1 - keep / of)) > 1e-9:
            raise ConfigError(
                f"the pattern {self.pattern} ends at sparsity {1 - keep / of}, the "
                f"ramp at {self.ramp.final}. Give the ramp that end."
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


def check_pattern(pattern: str, layers: Sequence[Layer]) -> None:
    """See that layers can be pruned to a pattern."""
    if pattern == UNITS:
        structures(layers)
    elif pattern != UNSTRUCTURED:
        _, of = keep_of(pattern)
        for layer in layers:
            if layer.shape[1] % of:
                raise ModelError(
                    f"the layer {layer.name!r} has {layer.shape[1]} columns, which the "
                    f"groups of {pattern} do not divide. Leave it out, or take another "
                    "pattern."
                )
