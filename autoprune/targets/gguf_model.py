"""What a GGUF file of one model holds under a policy, and what llama.cpp cannot run.

llama.cpp builds most models with one width for all blocks. Where a policy leaves blocks
of different widths, a Llama or Mistral becomes the architecture ``deci``, which has
numbers of heads and channels for each block. All rules here were read in the sources of
llama.cpp (``src/models/*.cpp``), and its build in llama-cpp-python 0.3.36 has run them.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH

from autoprune.compression.formats import FORMATS
from autoprune.compression.storage import Part, Storage
from autoprune.errors import ExportError, ModelError
from autoprune.exporting.exporter import in_order
from autoprune.exporting.switches import BiasSwitches
from autoprune.models.checkpoints import Checkpoint, load_tokenizer
from autoprune.models.layers import Inventory
from autoprune.policy import Layer
from autoprune.targets.gguf_blocks import BLOCK, VALUES, Kind, kind_of, row_bytes
from autoprune.targets.gguf_families import (
    Family,
    family_of,
    head_dim,
    misfit,
    named,
    names_of,
    rope,
)
from autoprune.targets.gguf_tokenizer import Vocabulary, vocabulary
from autoprune.targets.per_layer import PerLayerModel
from autoprune.targets.per_layer_blocks import Block, Names, cut_shape

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, where a model scales them one by one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: In the file.
        source: In the dense model.
        shape: As torch counts it.
        kind: Its type.
        layer: The layer whose weight or bias it is; None for any other tensor.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: Kind
    layer: Layer | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


class GgufModel:
    """Knows one dense model, and what becomes of it under a policy.

    Args:
        model: The dense model as it was loaded.
        inventory: Its layers.

    Attributes:
        config: Its configuration.
        inventory: Its layers.
        parts: How its blocks can be cut.
        family: What llama.cpp makes of it; of Llama where it has no word for it.
    """

    def __init__(self, model: Any, inventory: Inventory) -> None:
        self.config = copy.deepcopy(model.config)
        self.inventory = inventory
        self.parts = PerLayerModel(model, inventory)
        self.family: Family = family_of(model.config)
        self._misfit = misfit(model, inventory, self.parts.untouched)
        self._folder = str(getattr(model, "name_or_path", "") or "")
        self._tokenizer: Vocabulary | str | None = None
        self._class = type(model)

    @cached_property
    def switches(self) -> BiasSwitches:
        """Which settings give layers a bias; of a model that is no misfit."""
        with torch.device("meta"):
            empty = self._class(copy.deepcopy(self.config))
        return BiasSwitches(empty, self.inventory)

    @property
    def misfit(self) -> str | None:
        """Why no file can be made of the model or its tokenizer; None if one can."""
        found = self._misfit or self._read_tokenizer()
        return found if isinstance(found, str) else None

    @property
    def tokenizer(self) -> Vocabulary:
        """The tokenizer of a model that is no misfit."""
        found = self._read_tokenizer()
        assert isinstance(found, Vocabulary), found
        return found

    def _read_tokenizer(self) -> Vocabulary | str:
        if self._tokenizer is None and not self._folder:
            self._tokenizer = "the model was not loaded from a folder with a tokenizer"
        elif self._tokenizer is None:
            checkpoint = Checkpoint(self._folder, Path(self._folder), "")
            try:
                tokenizer = load_tokenizer(checkpoint)
                self._tokenizer = vocabulary(tokenizer, self.config.vocab_size)
            except (ExportError, ModelError) as error:
                self._tokenizer = f"the tokenizer cannot be written: {error}"
        assert self._tokenizer is not None
        return self._tokenizer

    def refuses(self, layer: Layer, storage: Storage) -> str | None:
        """Say why a layer so stored cannot be written, or None."""
        if storage.bias:
            if layer.role not in self.family.biased:
                arch = self.family.arch.name.lower()
                return f"llama.cpp's {arch} has no place for a bias of {layer.role}"
            if why := self.switches.refuses(layer):
                return why
        return self.refuses_codes(layer, storage)

    def refuses_codes(self, layer: Layer, storage: Storage) -> str | None:
        """Say why a layer's numbers cannot be written as they are, or None."""
        more = "factors of low rank" if storage.low_rank else "scales of inputs"
        if storage.low_rank or storage.channel_scales:
            return (
                f"llama.cpp has no place for {more} beside a weight. Take an action "
                "without them, such as rtn or gptq alone, or export as packed"
            )
        if storage.bits is None:
            return None
        if kind_of(storage) is None:
            return _no_type(storage)
        weight = self.parts.most(layer, storage).get(f"{layer.name}.weight")
        columns = weight.shape[1] if weight else BLOCK
        if columns % BLOCK or (storage.group or BLOCK) % BLOCK:
            return (
                f"blocks of GGUF are {BLOCK} weights of a row with one scale; here are "
                f"rows of {columns} in groups of {storage.group or 'a row'}. Take "
                f"groups and widths that {BLOCK} divides"
            )
        cut = layer.cut
        columns_go = storage.units is not None and cut and cut.axis == "columns"
        if columns_go and storage.group and cut and cut.unit % BLOCK:
            return (
                f"some of its columns go, so that groups of {storage.group} no longer "
                "stand together. Quantize it with one scale a row (no group), or do "
                f"not remove {cut.kind} of its block"
            )
        return None

    def refuses_policy(self, storages: Mapping[Layer, Storage]) -> str | None:
        """Say why llama.cpp cannot run what stays of the blocks, or None."""
        blocks = self.parts.blocks(storages)
        for block in blocks:
            if not block.channels:
                return (
                    f"blocks.{block.index} keeps its attention but no MLP, and "
                    "llama.cpp's deci leaves out what such an attention adds, without "
                    "a word. Drop the block as a whole, keep some of its channels, or "
                    "export as packed or per-layer"
                )
        if not blocks or not blocks[0].heads:
            where = f"blocks.{blocks[0].index}" if blocks else "the model"
            return (
                f"{where}, the first that stays, has no attention, and llama.cpp takes "
                "the size of all heads from the first. Keep the attention there, or "
                "drop the block as a whole"
            )
        if self.arch(blocks) is None:
            kind = self.config.model_type
            return (
                f"blocks keep different widths, and llama.cpp's {kind} has one for all "
                "of them. Let every block keep equally many channels and heads, or "
                "export as packed"
            )
        full = self.config.num_key_value_heads
        if not self.family.heads and any(block.heads < full for block in blocks):
            return (
                f"llama.cpp's {self.config.model_type} wants as many heads as the "
                "hidden state is wide. Remove channels or blocks, or export as "
                "transformers"
            )
        return None

    def biases(self, storages: Mapping[Layer, Storage]) -> tuple[str, ...]:
        """Name the settings that give layers the biases they have not had so far."""
        return self.switches.needed(la for la, one in storages.items() if one.bias)

    def arch(self, blocks: tuple[Block, ...]) -> MODEL_ARCH | None:
        """Choose the architecture; None if there is none for such widths."""
        widths = {(block.heads, block.channels) for block in blocks}
        if len(widths) == 1 and all(widths.pop()):
            return self.family.arch
        return self.family.uneven

    def entries(self, storages: Mapping[Layer, Storage]) -> list[Entry]:
        """List the tensors in the order in which they are written.

        Layers that are not named are left out.
        """
        blocks, places = self.parts.blocks(storages), self.parts.names(storages)
        arch = self.arch(blocks) or self.family.arch
        names = names_of(arch, max(1, len(blocks)))
        found = []
        own = {f"{layer.name}.bias" for layer in self.inventory.layers}
        for source, part in self.parts.untouched.items():
            new = places(source)
            if source not in own and new is not None:
                found.append(Entry(named(names, new), source, part.shape, _kind(part)))
        if self.factors:
            size = head_dim(self.config) // 2
            found.append(Entry(ROPE_FACTORS, "", (size,), Kind.F32))
        for layer in in_order(storages):
            if stem := places(f"{layer.name}."):
                found += self._of_layer(layer, storages[layer], stem, places, names)
        return found

    def _of_layer(
        self, layer: Layer, storage: Storage, stem: str, places: Names, names: Any
    ) -> list[Entry]:
        shape, biased = layer.shape, False
        if layer.cut is not None:
            block = places.block(layer)
            shape = cut_shape(layer, block.of(layer.cut.kind))
            biased = layer.name.rpartition(".")[2] in block.biases
        weight = self.entry(layer, storage, shape, named(names, f"{stem}weight"))
        if not biased:
            return [weight]
        name, source = named(names, f"{stem}bias"), f"{layer.name}.bias"
        return [weight, Entry(name, source, shape[:1], Kind.F32, layer)]

    def entry(
        self, layer: Layer, storage: Storage, shape: tuple[int, ...], name: str
    ) -> Entry:
        """Describe a layer's weight; as plain values if its codes are refused."""
        kind = kind_of(storage)
        if kind is None or self.refuses_codes(layer, storage):
            kind = VALUES.get(storage.dtype, Kind.F32)
        return Entry(name, f"{layer.name}.weight", shape, kind, layer)

    @property
    def factors(self) -> bool:
        """True if rotary frequencies are scaled one by one."""
        return rope(self.config).get("rope_type") == "llama3"


def _kind(part: Part) -> Kind:
    """Choose the type of a tensor that is no layer's; vectors are always in float32."""
    return Kind.F32 if len(part.shape) < 2 else VALUES.get(part.dtype, Kind.F32)


def _no_type(storage: Storage) -> str:
    form = FORMATS[storage.code]
    if form.values:
        return (
            f"llama.cpp has no type for {storage.code} that this AutoPrune writes. "
            "Take mxfp4, or codes of rtn or gptq in groups of 32"
        )
    if form.float_zeros:
        return (
            "zero points that are no whole numbers need a minimum for each block, "
            "which 4 and 5 bits have, and which does not keep removed weights at zero. "
            "Take 4 or 5 bits of dense weights, or whole zero points"
        )
    return (
        f"codes of {storage.bits} bits with zero points span more than the 8 bits of "
        "the largest type. Take symmetric=true, or fewer bits"
    )
