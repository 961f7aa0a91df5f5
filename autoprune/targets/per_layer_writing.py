"""Gives the tensors of a model with widths of its own in every block, one by one.

The dense model lies mapped in its file. In memory is the layer that is being given, and
of the others only which of their rows and columns stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from autoprune.errors import ExportError
from autoprune.exporting.cutting import kept_units
from autoprune.exporting.digests import digest
from autoprune.exporting.exporter import Digests, ExportJob, in_order
from autoprune.exporting.folding import check_foldable
from autoprune.exporting.shrinking import Units
from autoprune.policy import Layer, Site
from autoprune.targets.per_layer import PerLayerModel
from autoprune.targets.per_layer_blocks import units_of


@dataclass(frozen=True, eq=False)
class PerLayerTensors:
    """What is written, tensor by tensor; go through it once.

    Attributes:
        model: The dense model, mapped from its file; it stays as it is.
        job: What is exported.
        known: How its blocks can be cut.
        digests: Of the layers that have been given, by their new names.
    """

    model: Any
    job: ExportJob
    known: PerLayerModel
    digests: Digests = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor under its name in the smaller model.

        Raises:
            ExportError: If columns have an order that no other layer can follow, or the
                layers of a structure do not keep the same units.
        """
        state = self.model.state_dict()
        names = self.known.names(self.job.storages)
        layers = in_order(self.job.inventory.layers)
        named = {f"{la.name}.{part}" for la in layers for part in ("weight", "bias")}
        for name in self.known.untouched:
            new = names(name)
            if new is not None and name not in named:
                yield new, state[name]
        lines: dict[Layer, Int[Tensor, " kept"]] = {}
        for layer in layers:
            if (stem := names(f"{layer.name}.")) is None:
                continue
            if layer.cut is not None and layer not in lines:
                group = self.job.inventory.group_of(layer)
                wanted = names.block(layer).units(layer)
                lines |= self._lines(group, wanted)
            yield from self._layer(layer, stem, lines.get(layer), state)

    def _layer(
        self,
        layer: Layer,
        stem: str,
        lines: Int[Tensor, " kept"] | None,
        state: dict[str, Tensor],
    ) -> Iterator[tuple[str, Tensor]]:
        variant = self.job.variant(layer)
        weight, own = variant.weight, state.get(f"{layer.name}.bias")
        rows = layer.cut is not None and layer.cut.axis == "rows"
        if lines is not None:
            weight = weight.index_select(0 if rows else 1, lines)
        self.digests[stem.removesuffix(".")] = digest(weight)
        yield f"{stem}weight", weight
        bias = own
        if variant.bias is not None:  # rounded once, as ``put_bias`` does
            total = variant.bias.double() + (0 if own is None else own.double())
            bias = total.to(weight.dtype)
        if bias is not None:
            cut = lines if rows else None
            yield f"{stem}bias", bias if cut is None else bias.index_select(0, cut)

    def _lines(self, group: Site, wanted: int) -> dict[Layer, Int[Tensor, " kept"]]:
        """Tell which rows or columns of a structure's layers stay, in their order."""
        units, order = self._units(group, wanted)
        found: dict[Layer, Int[Tensor, " kept"]] = {}
        for layer in group.layers:
            assert layer.cut is not None, layer.name
            size = layer.cut.unit
            places = (units[:, None] * size + torch.arange(size)).flatten()
            if order is not None:  # of channels, which are single rows and columns
                found[layer] = order[torch.isin(order, places)]
            elif wanted < layer.cut.units:
                found[layer] = places
        return found

    def _units(self, group: Site, wanted: int) -> tuple[Units, Tensor | None]:
        """Find the units that stay, and the order that columns ask for, if any.

        What stays in one layer may be zeros in another, or in all of them: units that
        a later step has emptied count as well, and fill up what was declared.
        """
        full = units_of(group.layers[0])
        found, order = torch.zeros(full, dtype=torch.bool), None
        for layer in group.layers:
            permuted = self.job.storages[layer].permuted
            if not permuted and wanted == full:
                continue
            variant = self.job.variant(layer)
            found[kept_units(layer, variant)] = True
            if permuted:
                check_foldable(layer)
                order = variant.order
        if (count := int(found.sum())) > wanted:
            raise ExportError(
                f"the layers of {group.name} keep {count} units together, but {wanted} "
                "were declared, the same ones in all. The method that removed the "
                "others is at fault"
            )
        found[(~found).nonzero().flatten()[: wanted - count]] = True
        return found.nonzero().flatten(), order
