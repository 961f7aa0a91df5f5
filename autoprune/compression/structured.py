"""What a structured method is: units of a whole site are removed in all its layers.

While a search runs, what is removed is a mask: rows of the layers that make a unit,
columns of the one that takes it. Exporters may cut the tensors.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.masks import smallest
from autoprune.compression.method import (
    CompressionMethod,
    Parameter,
    Settings,
    Source,
)
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer
from autoprune.sites import Cut

KEEP = Parameter(
    "keep",
    float,
    None,
    "Fraction of the units to keep.",
    0,
    1,
    open_range=True,
    required=True,
    example=0.5,
)

LADDER = 128
"""Widths go in steps of so many channels, where the model has steps to spare."""

FEWEST_STEPS = 8
"""A width that has fewer such steps is cut in smaller ones."""

SITES = {
    "block": "blocks.*.block",
    "channels": "blocks.*.mlp",
    "heads": "blocks.*.attention",
    "hidden": "hidden",
}
"""What sites of a kind are called in a space."""


def places(method: CompressionMethod) -> str:
    """Tell which sites of a space a method acts on."""
    return "Name sites such as " + ", ".join(
        SITES.get(kind, f"*.{kind}") for kind in sorted(method.kinds)
    )


def kept_units(cut: Cut, keep: float) -> int:
    """Count the units that stay: the nearest rung of the ladder, at least one.

    Example:
        >>> kept_units(Cut("channels", "rows", 1, 1536), 0.7)
        1024
        >>> kept_units(Cut("heads", "rows", 64, 3), 0.7)
        2
    """
    step = LADDER
    while step > 1 and (cut.units % step or cut.units < FEWEST_STEPS * step):
        step //= 2
    if cut.kind != "channels":
        step = 1
    return max(1, round(keep * cut.units / step)) * step


class StructuredMethod(CompressionMethod):
    """A method that removes units: channels of an MLP, heads of an attention.

    A subclass finishes ``scores``, or takes over ``compress_site`` if it also changes
    what is left.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"channels", "heads"})
    parameters: ClassVar[tuple[Parameter, ...]] = (KEEP,)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        if layer.cut is None or layer.cut.kind not in self.kinds:
            return f"it is part of no such structure. {places(self)}"
        if previous != Storage.dense(layer):
            return f"{self.name} comes first: it removes units of dense layers"
        if kept_units(layer.cut, settings["keep"]) == layer.cut.units:
            return f"keep={settings['keep']} removes none of {layer.cut.units} units"
        return None

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        cut = _cut_of(layer)
        kept = kept_units(cut, settings["keep"])
        count = layer.numel // cut.units * kept
        return previous.masked(count, _tile(layer, cut), units=kept)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Refuse: a layer alone does not know what the others of its site keep."""
        names = ", ".join(source.layer.name for source in sources)
        raise MethodError(f"{self.name} acts on whole sites, not on {names} alone")

    def compress_site(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants of all layers of a site, for several settings at once.

        Args:
            sources: Every layer of the site, dense; the one that takes units is last.
            statistics: Of each input, with what ``needs`` names.
            settings: Complete parameters, one entry a wanted variant.

        Returns:
            For each layer, its variants in the order of ``settings``.

        Raises:
            MethodError: If the numbers do not allow it; names layer and reason.
        """
        made: list[list[Variant]] = [[] for _ in sources]
        known: dict[tuple[str, ...], Float[Tensor, " units"]] = {}
        for one in settings:
            kind = tuple(f"{n}={v}" for n, v in sorted(one.items()) if n != "keep")
            if kind not in known:
                known[kind] = self.scores(sources, statistics, one)
            kept = choose(sources, known[kind], one)
            for variants, source in zip(made, sources, strict=True):
                variants.append(masked(source, kept))
        return made

    @abstractmethod
    def scores(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Settings,
    ) -> Float[Tensor, " units"]:
        """Tell how important every unit is; larger is kept."""


def choose(
    sources: Sequence[Source], scores: Float[Tensor, " units"], settings: Settings
) -> Bool[Tensor, " units"]:
    """Mark the units to keep: an exact count, earlier ones first on ties.

    Raises:
        MethodError: If a score is NaN or infinite.
    """
    if not torch.isfinite(scores).all():
        raise MethodError(
            f"the units of {sources[-1].layer.name} have scores that are NaN or "
            "infinite. Check the checkpoint and the statistics."
        )
    cut = _cut_of(sources[-1].layer)
    removed = cut.units - kept_units(cut, settings["keep"])
    return ~smallest(scores.reshape(1, -1), removed)[0]


def masked(
    source: Source,
    kept: Bool[Tensor, " units"],
    weight: Float[Tensor, "out in"] | None = None,
) -> Variant:
    """Give a layer with only some of its units.

    Args:
        source: The layer, dense.
        kept: True where a unit stays.
        weight: What is left of the weight, if it has changed.
    """
    cut = _cut_of(source.layer)
    lines = kept.repeat_interleave(cut.unit)
    lines = lines[:, None] if cut.axis == "rows" else lines[None]
    full = lines.expand(source.layer.shape).contiguous()
    weight = source.variant.weight if weight is None else weight
    tile, units = _tile(source.layer, cut), int(kept.sum())
    return source.variant.pruned(weight, full, pattern=tile, units=units)


def in_units(
    source: Source, values: Float[Tensor, "out in"]
) -> Float[Tensor, "units size"]:
    """Line up what a layer has of each unit.

    Args:
        source: The layer.
        values: Its weight, or something of its shape.
    """
    cut = _cut_of(source.layer)
    lines = values if cut.axis == "rows" else values.t()
    return lines.reshape(cut.units, -1)


def _cut_of(layer: Layer) -> Cut:
    assert layer.cut is not None, layer.name
    return layer.cut


def _tile(layer: Layer, cut: Cut) -> str:
    """Name the mask: one bit a unit."""
    rows, columns = layer.shape
    return f"{cut.unit}x{columns}" if cut.axis == "rows" else f"{rows}x{cut.unit}"
