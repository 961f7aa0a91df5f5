"""Decides what of a policy's zeros a plain checkpoint can leave out, and leaves it out.

Blocks that hold only zeros go as a whole. Channels and heads go where all blocks that
stay keep equally many. Anything else stays zeros, and a note says so.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import ExportError
from autoprune.exporting.rotating import narrowed
from autoprune.exporting.shrinking import (
    Remains,
    Units,
    passing_blocks,
    shrunk_config,
    shrunk_state,
    skeleton,
)
from autoprune.exporting.switches import BiasSwitches, everything
from autoprune.models.hidden import HIDDEN
from autoprune.models.layers import Inventory
from autoprune.models.loading import first_line
from autoprune.policy import Layer, Site

_KINDS = ("channels", "heads")
STAY = "stay as zeros of full size"
"""What is told of zeros that cannot be left out."""


class Cutter:
    """Knows how one model can be cut.

    Args:
        model: The dense model as it was loaded.
        inventory: Its layers.

    Attributes:
        whole: What stays if nothing is left out.
        stored: Names in memory of all tensors that a checkpoint of the model stores.
        switches: Which settings give layers a bias.
    """

    def __init__(self, model: Any, inventory: Inventory) -> None:
        self.whole = Remains(tuple(range(len(inventory.blocks))))
        self._inventory = inventory
        self._passing = passing_blocks(model, inventory)
        self._model = skeleton(model, deepcopy(model.config))
        self._state = stored_tensors(model)
        self.stored = tuple(self._state)
        self.switches = BiasSwitches(self._model, inventory)
        self._misfits: dict[Remains, str | None] = {}

    def decide(self, storages: Mapping[Layer, Storage]) -> tuple[Remains, list[str]]:
        """Tell what stays under a policy, and notes for people on all that was removed.

        Args:
            storages: What every layer stores.
        """
        biased = [layer for layer, storage in storages.items() if storage.bias]
        empty = {la for la, s in storages.items() if not s.stored and not s.bias}
        gone = self._empty_blocks(empty)
        remains, notes = self._left_blocks(gone)
        if needed := self.switches.needed(biased):
            remains = replace(remains, biases=needed)
            count = len(self.switches.added(needed))
            notes.append(f"{' and '.join(needed)}: {count} layers get a bias")
        remains, told = self._narrowed(remains, storages)
        notes += told
        for kind in _KINDS:
            groups = [
                group
                for group in self._inventory.groups
                if group.kind == kind and group.layers[0].block in remains.blocks
            ]
            alive = [group for group in groups if not empty.issuperset(group.layers)]
            dead = [group for group in groups if group not in alive]
            if dead := [g for g in dead if g.layers[0].block not in gone]:
                notes.append(f"{_names(dead)} alone: a block needs both, so zeros stay")
            counts = {_units(group, storages) for group in alive}
            full = {_full(group) for group in groups}
            if not counts or counts == full:
                continue
            what = f"{kind}: {min(counts)} of {min(full)} stay in every block"
            if len(counts) > 1 or len(full) > 1:
                span = f"{min(counts)} to {max(counts)} of {max(full)}"
                notes.append(f"{kind} {STAY}: blocks keep {span}, not equally many")
                continue
            wanted = replace(remains, units=(*remains.units, (kind, min(counts))))
            why = self._misfit(wanted)
            remains = remains if why else wanted
            notes.append(f"{kind} {STAY}: {why}" if why else f"cut {what}")
        return remains, notes

    def empty(self, remains: Remains) -> tuple[Any, dict[str, Tensor]]:
        """Give the smaller model and its tensors as they are saved, without weights."""
        if remains == self.whole:
            return self._model, self._state
        config = shrunk_config(self._model.config, remains, self._inventory)
        first = {
            layer: torch.arange(units) for layer, units in self._cut_layers(remains)
        }
        state = self.shrunk(self._with_biases(self._state, remains), remains, first)
        return skeleton(self._model, config), state

    def own_shape(self, layer: Layer, storage: Storage) -> tuple[int, int]:
        """Give the shape of a layer as far as it does not depend on other layers."""
        return storage.shape

    def kept(self, layer: Layer, variant: Variant) -> Units:
        """Find the units that a variant keeps; none if it keeps no whole ones."""
        return kept_units(layer, variant)

    def cut(self, model: Any, remains: Remains, kept: Mapping[Layer, Units]) -> Any:
        """Give the smaller model.

        Args:
            model: The model, with the policy on it.
            remains: What stays, from ``decide``.
            kept: The units of every layer, as ``kept`` finds them.

        Raises:
            ExportError: If the layers of a structure do not keep the same units.
        """
        if remains == self.whole:
            return model
        small, _ = self.empty(remains)
        state = self._with_biases(model.state_dict(), remains)
        state = self.shrunk(state, remains, self.units(remains, kept))
        small.load_state_dict(state, strict=True, assign=True)
        small.tie_weights()
        return small.eval().requires_grad_(False)

    def units(
        self, remains: Remains, kept: Mapping[Layer, Tensor]
    ) -> dict[Layer, Tensor]:
        """Tell the units that stay, of every layer that is cut; see ``cut``."""
        units = {}
        for layer, count in self._cut_layers(remains):
            others = [kept[la] for la in self._inventory.group_of(layer).layers]
            found = next((one for one in others if len(one)), torch.arange(count))
            units[layer] = found
            if len(found) != count or (
                len(kept[layer]) and not torch.equal(kept[layer], found)
            ):
                raise ExportError(
                    f"{layer.name} keeps {len(kept[layer])} units, but {count} were "
                    "declared, the same in all layers of its site. The method that "
                    "removed them is at fault"
                )
        return units

    def shrunk(
        self,
        state: Mapping[str, Tensor],
        remains: Remains,
        units: Mapping[Layer, Units],
    ) -> dict[str, Tensor]:
        """Cut tensors, all of them or a few, and name them as in the smaller model."""
        if directions := dict(remains.units).get(HIDDEN):
            assert self._inventory.hidden is not None
            state = narrowed(state, self._inventory.hidden, directions)
        return shrunk_state(
            self._model, state, remains, inventory=self._inventory, kept=units
        )

    def _with_biases(
        self, state: Mapping[str, Tensor], remains: Remains
    ) -> dict[str, Tensor]:
        """Add zeros where a setting gives a bias that nothing was added to."""
        meta = state is self._state
        zeros = self.switches.added(remains.biases)
        new = {n: t.to("meta") if meta else t.contiguous() for n, t in zeros.items()}
        return {**new, **state}

    def narrow_misfit(self, directions: int) -> str | None:
        """Say why no model with so wide a hidden state can be written, or None."""
        return self._misfit(replace(self.whole, units=((HIDDEN, directions),)))

    def _narrowed(
        self, remains: Remains, storages: Mapping[Layer, Storage]
    ) -> tuple[Remains, list[str]]:
        """Tell how wide the hidden state stays."""
        found = {storage.hidden for storage in storages.values()}
        if found <= {None}:
            return remains, []
        directions, state = found.pop(), self._inventory.hidden
        if found or directions is None or state is None:
            return remains, [f"directions {STAY}: layers do not keep the same"]
        if why := self.narrow_misfit(directions):
            return remains, [f"directions {STAY}: {why}"]
        note = f"cut the hidden state: {directions} of {state.width} directions stay"
        return replace(remains, units=(*remains.units, (HIDDEN, directions))), [note]

    def _empty_blocks(self, empty: set[Layer]) -> list[int]:
        """Give the blocks that have layers, but only zeros in them."""
        inside: dict[int, list[Layer]] = {block: [] for block in self.whole.blocks}
        for layer in self._inventory.layers:
            if layer.block is not None:
                inside[layer.block].append(layer)
        return [
            b for b, layers in inside.items() if layers and empty.issuperset(layers)
        ]

    def _left_blocks(self, empty: list[int]) -> tuple[Remains, list[str]]:
        """Tell which blocks stay, if those that hold only zeros can go."""
        notes: list[str] = []
        if held := [block for block in empty if block not in self._passing]:
            reason = "it still adds a bias, or norms what passes it"
            notes.append(f"dropped blocks {numbers(held)} {STAY}: {reason}")
        if not (gone := [block for block in empty if block in self._passing]):
            return self.whole, notes
        wanted = Remains(tuple(b for b in self.whole.blocks if b not in gone))
        why = self._misfit(wanted) if wanted.blocks else "no block would be left"
        which = f"{numbers(gone)} of {len(self.whole.blocks)}"
        if why:
            return self.whole, [*notes, f"dropped blocks {which} {STAY}: {why}"]
        return wanted, [*notes, f"left out blocks {which}, counted from 0"]

    def _cut_layers(self, remains: Remains) -> Iterator[tuple[Layer, int]]:
        """Give the layers that are cut, each with the number of units that stay."""
        units = dict(remains.units)
        for layer in self._inventory.layers:
            if layer.block in remains.blocks and layer.cut and layer.cut.kind in units:
                yield layer, units[layer.cut.kind]

    def _misfit(self, remains: Remains) -> str | None:
        """Say why the class cannot hold what stays; None if it can."""
        if remains not in self._misfits:
            self._misfits[remains] = self._compare(remains)
        return self._misfits[remains]

    def _compare(self, remains: Remains) -> str | None:
        try:
            model, state = self.empty(remains)
        except Exception as error:  # a foreign class refuses a configuration as it may
            cause = error.__cause__
            return first_line(cause if isinstance(cause, Exception) else error)
        wanted = {name: shape for name, (_, shape) in everything(model).items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        odd = sorted(n for n in wanted | given if wanted.get(n) != given.get(n))
        kind = type(model).__name__
        return f"{kind} would want another shape of {odd[0]}" if odd else None


def kept_units(layer: Layer, variant: Variant) -> Units:
    """Find the units that a variant keeps; none if it has no mask."""
    cut, mask = layer.cut, variant.mask
    if cut is None or mask is None:
        return torch.arange(0)
    lines = mask.any(1 if cut.axis == "rows" else 0)
    return lines.view(cut.units, cut.unit).any(1).nonzero().flatten()


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Give what a checkpoint of a model stores, by name, without memory."""
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (dtype, shape) in everything(model).items()
    }


def _full(group: Site) -> int:
    cut = group.layers[0].cut
    assert cut is not None, group.name
    return cut.units


def _units(group: Site, storages: Mapping[Layer, Storage]) -> int:
    """Count the units of a structure that are not zeros in any of its layers."""
    full = _full(group)
    found = {storages[layer].units for layer in group.layers}
    factors = any(storages[layer].low_rank for layer in group.layers)
    return full if len(found) > 1 or factors else found.pop() or full


def numbers(blocks: list[int]) -> str:
    """Name some blocks."""
    return ", ".join(map(str, blocks))


def _names(groups: list[Site]) -> str:
    return "dropped " + ", ".join(group.name for group in groups)
