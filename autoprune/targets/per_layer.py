"""What stays of every block by itself, and what a model of such blocks consists of.

Where ``cutting`` needs all blocks equally wide, here each keeps its own channels and
its own groups of heads. The class that runs such a model is in ``modeling_per_layer``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from autoprune.compression.storage import Part, Storage
from autoprune.exporting.exporter import in_order
from autoprune.models.layers import Inventory, untouched_parameters
from autoprune.policy import Layer, Site
from autoprune.targets.per_layer_blocks import (
    PARTS,
    Names,
    cut_shape,
    notes_on,
    smaller_config,
    units_of,
)
from autoprune.targets.per_layer_blocks import Block as Block

MODEL_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""Classes whose mathematics ``modeling_per_layer`` has, by model type."""


class PerLayerModel:
    """Knows one dense model: how its blocks can be cut, and what is then written.

    Args:
        model: The dense model as it was loaded.
        inventory: Its layers.

    Attributes:
        untouched: Every tensor that is no layer's.
        misfit: Why no such model can be made of it; None if it can. Then nothing else
            may be asked.
    """

    def __init__(self, model: Any, inventory: Inventory) -> None:
        self.untouched = {
            name: Part(*about)
            for name, about in untouched_parameters(model, inventory).items()
        }
        self._config = model.config
        self._stem = "".join(inventory.blocks[:1]).rpartition(".")[0] + "."
        self._count = len(inventory.blocks)
        self._groups = {
            (group.kind, group.layers[0].block): group
            for group in inventory.groups
            if group.kind in PARTS
        }
        self._biased = {
            la for la in inventory.layers if f"{la.name}.bias" in self.untouched
        }
        self.misfit = self._misfit(model)

    def blocks(self, storages: Mapping[Layer, Storage]) -> tuple[Block, ...]:
        """Tell what stays of each block; layers that are not named are dense."""
        added = {layer for layer, storage in storages.items() if storage.bias}
        found = []
        for index in range(self._count):
            groups = {kind: self._groups[kind, index] for kind in PARTS}
            widths = {kind: self._width(one, storages) for kind, one in groups.items()}
            stay = [la for kind in PARTS if widths[kind] for la in groups[kind].layers]
            biased = [la for la in stay if la in self._biased or la in added]
            biases = tuple(la.name.rpartition(".")[2] for la in biased)
            if stay:
                found.append(Block(index, **widths, biases=biases))
        return tuple(found)

    def names(self, storages: Mapping[Layer, Storage]) -> Names:
        """Tell what tensors are called in the smaller model."""
        return Names(self._stem, self.blocks(storages))

    def name(self, name: str, blocks: Sequence[Block]) -> str | None:
        """Tell what one tensor is called; None if it is left out."""
        return Names(self._stem, blocks)(name)

    def is_cut(self, storages: Mapping[Layer, Storage]) -> bool:
        """Tell whether anything is left out under a policy."""
        blocks = self.blocks(storages)
        full = self._full()
        return self._count > len(blocks) or any(
            block.of(kind) < full[kind] for block in blocks for kind in PARTS
        )

    def most(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name what is written of a layer at most, told from it alone."""
        shape = layer.shape
        if layer.cut is not None and not storage.low_rank:
            if _is_dropped(storage) and self._can_go(layer):
                return {}
            if storage.units is not None:
                shape = cut_shape(layer, storage.units)
        return self._parts(layer, f"{layer.name}.", shape, storage)

    def declared(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> dict[str, Part]:
        """Name every tensor in the order in which it is written."""
        names = self.names(storages)
        tensors = {}
        own = {f"{layer.name}.bias" for layer in self._biased}
        for name, part in untouched.items():
            renamed = names(name)
            if name not in own and renamed is not None:
                tensors[renamed] = part
        for layer in in_order(storages):
            if (stem := names(f"{layer.name}.")) is None:
                continue
            shape = layer.shape
            if layer.cut is not None:
                shape = cut_shape(layer, names.block(layer).units(layer))
            tensors |= self._parts(layer, stem, shape, storages[layer])
        return tensors

    def config(self, storages: Mapping[Layer, Storage], dtype: str) -> dict[str, Any]:
        """Give the configuration of the smaller model, its weights of a type."""
        queries = self._groups["heads", 0].layers[0]
        return smaller_config(
            self._config,
            self.blocks(storages),
            groups=units_of(queries),
            rows=queries.shape[0],
            dtype=dtype,
        )

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell people what is left out, and what stays at full size."""
        blocks = self.blocks(storages)
        return list(notes_on(blocks, self._full(), self._count, storages))

    def refuses_policy(self, storages: Mapping[Layer, Storage]) -> str | None:
        """Say why no model is left under a policy, or None."""
        if any(block.heads for block in self.blocks(storages)):
            return None
        return (
            "no block would keep an attention, without which a model cannot tell what "
            "stood before a token. Let the policy keep one"
        )

    def _full(self) -> dict[str, int]:
        return {kind: units_of(self._groups[kind, 0].layers[0]) for kind in PARTS}

    def _misfit(self, model: Any) -> str | None:
        known = " and ".join(MODEL_CLASSES)
        kind, name = getattr(model.config, "model_type", None), type(model).__name__
        if MODEL_CLASSES.get(str(kind)) != name:
            return (
                f"the target per-layer writes models of the types {known}, not a {name}"
                f" of the type {kind!r}. The target transformers writes any model, cut "
                "where all blocks keep equally many units"
            )
        blocks = range(self._count)
        if any((kind, index) not in self._groups for kind in PARTS for index in blocks):
            return (
                "where the heads and channels of the model are is not known. The "
                "target transformers writes it as it is"
            )
        return None

    def _can_go(self, layer: Layer) -> bool:
        """Tell whether a layer's site leaves nothing behind when it is all zeros.

        The bias of its last layer would stay.
        """
        kind = layer.cut.kind if layer.cut else ""
        group = self._groups.get((kind, layer.block))
        return group is not None and group.layers[-1] not in self._biased

    def _width(self, group: Site, storages: Mapping[Layer, Storage]) -> int:
        """Count the units of a structure that stay; 0 if nothing of it does."""
        full = units_of(group.layers[0])
        found = [storages[layer] for layer in group.layers if layer in storages]
        if len(found) < len(group.layers):
            return full
        if not any(storage.stored or storage.bias for storage in found):
            return 0 if self._can_go(group.layers[0]) else full
        counts = {storage.units for storage in found}
        if len(counts) > 1 or any(storage.low_rank for storage in found):
            return full
        return counts.pop() or full

    def _parts(
        self, layer: Layer, stem: str, shape: tuple[int, int], storage: Storage
    ) -> dict[str, Part]:
        parts = {f"{stem}weight": Part(layer.dtype, shape)}
        if layer in self._biased or storage.bias:
            parts[f"{stem}bias"] = Part(layer.dtype, shape[:1])
        return parts


def _is_dropped(storage: Storage) -> bool:
    """Tell a layer that a structured method has removed, from one of plain zeros."""
    rows, columns = storage.shape
    whole = storage.mask == f"{rows}x{columns}"
    return whole and not storage.stored and not storage.bias
