"""Gives the tensors of a plain checkpoint one layer at a time, however many there are.

The dense model lies mapped in its file. Only the layer that is being given is in
memory: its variant, put in the order and cut to the units that stay.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autoprune.compression.variant import Variant
from autoprune.exporting.cutting import Cutter, kept_units
from autoprune.exporting.digests import digest
from autoprune.exporting.exporter import Digests, ExportJob, in_order
from autoprune.exporting.folding import check_foldable
from autoprune.exporting.shrinking import Remains, Units
from autoprune.models.weights import parameter_of, view_of_layer
from autoprune.policy import Layer


@dataclass(frozen=True, eq=False)
class Pieces:
    """What is written of a model, piece by piece.

    Attributes:
        model: The dense model, mapped from its file; it stays as it is.
        job: What is exported.
        cutter: How the model can be cut.
        remains: What stays of it.
        units: The units that stay, of every layer that is cut.
        orders: Channels of each layer in the order that they get; see ``folding``.
        digests: Of the tensors of layers that have been given.
    """

    model: Any
    job: ExportJob
    cutter: Cutter
    remains: Remains
    units: Mapping[Layer, Units]
    orders: Mapping[Layer, Tensor]
    digests: Digests = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, job: ExportJob, cutter: Cutter) -> "Pieces":
        """Find out what stays; reads only variants that say so.

        Raises:
            ExportError: If columns have an order that no other layer can follow, or the
                layers of a structure do not keep the same units.
        """
        remains = cutter.decide(job.storages)[0]
        kept: dict[Layer, Units] = {}
        orders: dict[Layer, Tensor] = {}
        for layer in job.inventory.layers:
            storage = job.storages[layer]
            cut = layer.cut is not None and layer.cut.kind in dict(remains.units)
            kept[layer] = torch.arange(0)
            if not (cut or storage.permuted):
                continue
            variant = job.variant(layer)
            kept[layer] = kept_units(layer, variant)
            if storage.permuted and variant.order is not None:
                check_foldable(layer)
                group = job.inventory.group_of(layer)
                orders |= dict.fromkeys(group.layers, variant.order)
        return cls(model, job, cutter, remains, cutter.units(remains, kept), orders)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor under its name in the smaller model."""
        state = self.model.state_dict()
        added = self.cutter.switches.added(self.remains.biases)
        wanted = {*self.cutter.stored, *added}
        layers: dict[str, list[Layer]] = {}
        for layer in in_order(self.job.inventory.layers):
            layers.setdefault(parameter_of(layer.name), []).append(layer)
        biases = {f"{layer.name}.bias" for one in layers.values() for layer in one}
        for name in self.cutter.stored:
            if name not in layers and name not in biases:
                yield from self._shrunk({name: state[name]})
        for parameter, parts in layers.items():
            if parts[0].block is None or parts[0].block in self.remains.blocks:
                piece = self._layer(parameter, parts, state[parameter])
                bias = f"{parts[0].name}.bias"
                if bias in wanted:
                    own = state.get(bias, added.get(bias))
                    assert own is not None, bias
                    piece[bias] = self._bias(parts[0], own)
                yield from self._shrunk(piece, parts)

    def _layer(
        self, parameter: str, layers: list[Layer], dense: Tensor
    ) -> dict[str, Tensor]:
        """Fill a parameter with the variants of its layers, experts one by one."""
        full = torch.empty_like(dense)
        for layer in layers:
            view = view_of_layer(self.model, layer.name, full)
            assert view is not None, layer.name
            view.copy_(self._ordered(layer, self.job.variant(layer)))
        return {parameter: full}

    def _ordered(self, layer: Layer, variant: Variant) -> Tensor:
        weight = variant.weight
        order = self.orders.get(layer)
        if order is None:
            return weight
        assert layer.cut is not None, layer.name
        rows = layer.cut.axis == "rows"
        return weight[order] if rows else weight[:, order]

    def _bias(self, layer: Layer, own: Tensor) -> Tensor:
        variant, order = self.job.variant(layer), self.orders.get(layer)
        total = own
        if variant.bias is not None:  # rounded once, as ``put_bias`` does
            total = (own.double() + variant.bias.double()).to(own.dtype)
        rows = layer.cut is not None and layer.cut.axis == "rows"
        return total if order is None or not rows else total[order]

    def _shrunk(
        self, piece: Mapping[str, Tensor], layers: list[Layer] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        units = {la: self.units[la] for la in layers or () if la in self.units}
        for name, tensor in self.cutter.shrunk(piece, self.remains, units).items():
            if layers:
                self.digests[name] = digest(tensor)
            yield name, tensor
