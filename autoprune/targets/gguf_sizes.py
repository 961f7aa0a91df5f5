"""What a GGUF file of one model takes on disk under a policy, layer by layer."""

from collections.abc import Mapping
from functools import cached_property

from autoprune.compression.storage import Storage
from autoprune.policy import Layer
from autoprune.targets.gguf_blocks import Kind
from autoprune.targets.gguf_families import named, names_of
from autoprune.targets.gguf_header import (
    data_bytes,
    header_bytes,
    padded,
    table_bytes,
    tokenizer_bytes,
    writer_of,
)
from autoprune.targets.gguf_model import Entry, GgufModel


class GgufSizes:
    """Knows the sizes of one model's files.

    Args:
        known: What becomes of the model.
    """

    def __init__(self, known: GgufModel) -> None:
        self._known = known

    @property
    def misfit(self) -> bool:
        """True if no such file can be made of the model."""
        return self._known.misfit is not None

    def of_file(self, storages: Mapping[Layer, Storage]) -> int:
        """Tell the exact size; of some layers only, a bound of what they make it."""
        if any(layer not in storages for layer in self._known.inventory.layers):
            prices = (self.of_layer(layer, one) for layer, one in storages.items())
            return self._base + sum(prices)
        blocks = self._known.parts.blocks(storages)
        arch = self._known.arch(blocks) or self._known.family.arch
        entries = self._known.entries(storages)
        writer = writer_of(self._known, blocks, entries, arch=arch)
        head = header_bytes(writer) + self._tokenizer
        return padded(head) + data_bytes(entries)

    def of_layer(self, layer: Layer, storage: Storage) -> int:
        """Price a layer, told from it alone: never below its part of the size."""
        parts = self._known.parts.most(layer, storage)
        if not parts:
            return 0
        weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
        shape = parts[weight].shape
        entry = self._known.entry(layer, storage, shape, named(self._names, weight))
        price = padded(entry.nbytes) + table_bytes(entry)
        if bias in parts:
            name = named(self._names, bias)
            one = Entry(name, bias, parts[bias].shape, Kind.F32, layer)
            price += padded(one.nbytes) + table_bytes(one)
        return price

    @cached_property
    def _names(self) -> object:
        blocks = len(self._known.inventory.blocks)
        return names_of(self._known.family.arch, blocks)

    @cached_property
    def _tokenizer(self) -> int:
        return tokenizer_bytes(self._known.tokenizer)

    @cached_property
    def _base(self) -> int:
        """Bound all that is written for every policy, whatever its architecture."""
        blocks, entries = self._known.parts.blocks({}), self._known.entries({})
        family = self._known.family
        heads = [
            header_bytes(writer_of(self._known, blocks, entries, arch=arch))
            for arch in (family.arch, family.uneven or family.arch)
        ]
        # A table that is longer by n bytes takes up to n and one gap more.
        return padded(max(heads) + self._tokenizer) + padded(1) + data_bytes(entries)
