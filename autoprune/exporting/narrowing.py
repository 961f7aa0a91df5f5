"""Makes single layers of a model narrower, for targets that hold modules of any width.

A plain checkpoint has one width for all blocks, and no name at all for most widths of a
convolutional network. Where modules are written one by one, each site keeps what its
policy keeps. How a module is made narrower is known by its kind.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import ExportError
from autoprune.exporting.cutting import (
    STAY,
    Cutter,
    kept_units,
    numbers,
    stored_tensors,
)
from autoprune.exporting.shrinking import Remains, Units
from autoprune.exporting.switches import BiasSwitches
from autoprune.models.kinds import NarrowingKind, kind_of
from autoprune.models.layers import Inventory
from autoprune.policy import Layer, Site
from autoprune.sites import Cut


def cutter_for(model: Any, inventory: Inventory) -> Cutter:
    """Give what cuts a model for a target that holds modules of any width.

    Args:
        model: The dense model as it was loaded.
        inventory: Its layers.
    """
    return (Narrower if _kinds(model, inventory) else Cutter)(model, inventory)


class Narrower(Cutter):
    """Knows how the layers of one model can be made narrower, each site for itself.

    ``Remains.units`` has the names of sites in the place of kinds of structures.

    Args:
        model: The dense model as it was loaded.
        inventory: Its layers.
    """

    def __init__(self, model: Any, inventory: Inventory) -> None:
        super().__init__(model, inventory)
        self.switches = OwnBiases(self._model, inventory)
        self._kinds = _kinds(model, inventory)
        sites = {site.name: self._parts(site) for site in inventory.groups}
        self._sites = {name: parts for name, parts in sites.items() if parts}

    def decide(self, storages: Mapping[Layer, Storage]) -> tuple[Remains, list[str]]:
        """Tell what stays under a policy, and notes for people on all that was removed.

        Args:
            storages: What every layer stores.
        """
        units: list[tuple[str, int]] = []
        cuts: dict[str, list[tuple[int, int]]] = {}
        for name, parts in self._sites.items():
            found = {_whole_units(la, cut, storages[la]) for la, cut in parts.items()}
            count, cut = found.pop(), next(iter(parts.values()))
            if count is not None and not found:
                units.append((name, count))
                cuts.setdefault(cut.kind, []).append((count, cut.units))
        biases = self.switches.needed(la for la, s in storages.items() if s.bias)
        notes = [f"{len(biases)} layers get a bias"] if biases else []
        for kind, pairs in cuts.items():
            kept, full = map(sum, zip(*pairs, strict=True))
            notes.append(f"cut {kind}: {kept} of {full} stay, sites: {len(pairs)}")
        empty = {la for la, s in storages.items() if not s.stored and not s.bias}
        if held := self._empty_blocks(empty):
            notes.append(f"dropped blocks {numbers(held)} {STAY}: norms add to them")
        return replace(self.whole, units=tuple(units), biases=biases), notes

    def own_shape(self, layer: Layer, storage: Storage) -> tuple[int, int]:
        """Give the shape of a layer as far as it does not depend on other layers."""
        rows, columns = storage.shape
        for cut, count in self._masked(layer, storage):
            by_rows = cut.axis == "rows"
            return (cut.unit * count, columns) if by_rows else (rows, cut.unit * count)
        return rows, columns

    def empty(self, remains: Remains) -> tuple[Any, dict[str, Tensor]]:
        """Give the smaller model and its tensors as they are saved, without weights."""
        small = deepcopy(self._model)
        for name, bias in self.switches.added(remains.biases).items():
            module = small.get_submodule(name.rpartition(".")[0])
            module.bias = nn.Parameter(bias.to("meta"), requires_grad=False)
        self._narrow(small, {n: torch.arange(count) for n, count in remains.units})
        return small, stored_tensors(small)

    def kept(self, layer: Layer, variant: Variant) -> Units:
        """Find the units that a variant keeps; none if it keeps no whole ones."""
        found = [cut for cut, _ in self._masked(layer, variant.storage)]
        return kept_units(replace(layer, cut=found[0] if found else None), variant)

    def cut(self, model: Any, remains: Remains, kept: Mapping[Layer, Units]) -> Any:
        """Make a model narrower.

        Args:
            model: The model, with the policy on it; changed.
            remains: What stays, from ``decide``.
            kept: The units of every layer, as ``kept`` finds them.

        Raises:
            ExportError: If the layers of a structure do not keep the same units.
        """
        units = {}
        for name, count in remains.units:
            parts = self._sites[name]
            units[name] = first = kept[next(iter(parts))]
            for layer in parts:
                if len(kept[layer]) != count or (kept[layer] != first).any():
                    raise ExportError(
                        f"{layer.name} keeps {len(kept[layer])} units, but {count} "
                        f"were declared, the same in all layers of {name}. The method "
                        "that removed them is at fault"
                    )
        self._narrow(model, units)
        return model

    def _parts(self, site: Site) -> dict[Layer, Cut]:
        """Tell where a site's units lie in its layers; empty if one has to stay."""
        parts = {
            layer: cut
            for layer in site.layers
            for cut in (layer.cut, layer.hidden)
            if cut is not None and cut.kind == site.kind and layer.name in self._kinds
        }
        return parts if len(parts) == len(site.layers) else {}

    def _masked(self, layer: Layer, storage: Storage) -> Iterator[tuple[Cut, int]]:
        """Find where whole units of a layer are gone, and count those that stay."""
        cuts = (parts[layer] for parts in self._sites.values() if layer in parts)
        for cut in cuts:
            if count := _whole_units(layer, cut, storage):
                yield cut, count

    def _narrow(self, model: nn.Module, units: Mapping[str, Units]) -> None:
        """Keep some units of sites, in every layer that has a part of them."""
        rows: dict[str, Units] = {}
        channels: dict[str, Units] = {}
        for name, kept in units.items():
            for layer, cut in self._sites[name].items():
                if cut.axis == "columns":
                    channels[layer.name] = _lines(kept, cut.unit // layer.kernel)
                    continue
                added = self._kinds[layer.name].added_to(model, layer.name)
                rows |= dict.fromkeys((layer.name, *added), _lines(kept, cut.unit))
        for path in rows | channels:
            some, read = rows.get(path), channels.get(path)
            self._kinds[path].narrow(model, path, rows=some, channels=read)


class OwnBiases(BiasSwitches):
    """Lets each layer have a bias by itself, as no configuration has to tell of it."""

    @cached_property
    def _by_switch(self) -> dict[str, list[str]]:
        """Name the biases that are not there yet; each is a switch of its own."""
        modules = dict(self._model.named_modules())
        new = (name for name in self._layers if name not in self._own)
        return {
            name: [name]
            for name in new
            if hasattr(modules.get(name.rpartition(".")[0]), "bias")
        }


def _kinds(model: nn.Module, inventory: Inventory) -> dict[str, NarrowingKind]:
    """Give the kinds of all layers that can be made narrower by themselves, by name."""
    modules = dict(model.named_modules())
    inside = (layer.name for layer in inventory.layers if layer.name in modules)
    kinds = ((name, kind_of(modules[name])) for name in inside)
    return {name: kind for name, kind in kinds if isinstance(kind, NarrowingKind)}


def _whole_units(layer: Layer, cut: Cut, storage: Storage) -> int | None:
    """Count the units that a mask of whole units keeps; None for any other mask."""
    rows, columns = layer.shape
    unit = (cut.unit, columns) if cut.axis == "rows" else (rows, cut.unit)
    if storage.mask is None or storage.tile != unit or storage.low_rank is not None:
        return None
    return storage.kept // prod(unit) or None


def _lines(units: Units, size: int) -> Int[Tensor, " lines"]:
    """Tell the lines of units of so many lines each."""
    return (units[:, None] * size + torch.arange(size)).flatten()
