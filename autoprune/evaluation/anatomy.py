"""What a policy leaves of a model, as a kernel sees it: shapes and formats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoprune.compression.formats import INTEGERS
from autoprune.compression.storage import Storage
from autoprune.errors import ModelError
from autoprune.latency.shape import (
    DENSE,
    SPARSE,
    Attention,
    Block,
    Linear,
    ModelShape,
)
from autoprune.models.layers import Inventory
from autoprune.policy import Layer

SIDE = 0.5
"""Share of a block's other work that belongs to its attention; the rest to its MLP."""


def format_of(storage: Storage) -> str:
    """Say what a weight can be multiplied as: what a kernel would see of its storage.

    Zeros count only where any four weights in a row have two of them at most, in the
    layer's own order of columns; scales count only where a kernel knows their place.
    """
    form = DENSE
    if storage.bits is not None:
        whole = storage.code == INTEGERS and not storage.channel_scales
        if storage.code.startswith("fp8_e4m3") and storage.group is None:
            form = "fp8-tensor" if storage.code.endswith("tensor") else "fp8-row"
        elif storage.bits == 8 and storage.code == INTEGERS and storage.symmetric:
            form = "int8" if storage.group is None else f"int8-g{storage.group}"
        elif whole and storage.group is not None:
            form = f"int{storage.bits}-g{storage.group}"
        elif whole:  # a scale a row, and zero points that no 8-bit kernel takes
            form = f"int{storage.bits}-rows"
        else:
            form = storage.code
    if not _is_two_of_four(storage):
        return form
    return SPARSE if form == DENSE else f"{SPARSE}+{form}"


def linears_of(layer: Layer, storage: Storage) -> tuple[Linear, ...]:
    """Say which products a layer is made of: none where nothing is left of it."""
    n, k = layer.shape
    if storage.units is not None and layer.cut is not None:
        left = storage.units * layer.cut.unit
        n, k = (left, k) if layer.cut.axis == "rows" else (n, left)
    if storage.hidden is not None and layer.hidden is not None:
        rows = layer.hidden.axis == "rows"
        n, k = (storage.hidden, k) if rows else (n, storage.hidden)
    found = []
    if storage.kept:
        found.append(Linear(layer.name, n, k, format_of(storage), layer.uses))
    if rank := storage.low_rank:
        inner = Linear(f"{layer.name}.low_rank_b", rank, k, DENSE, layer.uses)
        outer = Linear(f"{layer.name}.low_rank_a", n, rank, DENSE, layer.uses)
        found += [inner, outer]
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What time depends on beside the layers.

    Attributes:
        inventory: The layers.
        hidden: Width of the hidden state.
        attention: Of a dense block; None where the configuration does not tell.
        head: The output layer where it is none of the layers; None else.
    """

    inventory: Inventory
    hidden: int
    attention: Attention | None
    head: Linear | None

    @classmethod
    def of(cls, config: Any, inventory: Inventory, *, vocabulary: int) -> "Anatomy":
        """Read it off a model's configuration.

        Args:
            config: The model's configuration.
            inventory: Its layers.
            vocabulary: Rows of the output layer.

        Raises:
            ModelError: If the model is no transformer.
        """
        text = config.get_text_config()
        if not hasattr(text, "hidden_size"):
            raise ModelError(
                f"time is foretold for transformers, but {type(config).__name__} has "
                "no hidden_size. Leave out latency and its devices, and time what is "
                "exported."
            )
        hidden = int(text.hidden_size)
        heads = getattr(text, "num_attention_heads", None)
        attention = None
        if heads:
            kv_heads = getattr(text, "num_key_value_heads", None) or heads
            dim = getattr(text, "head_dim", None) or hidden // heads
            attention = Attention(heads, kv_heads, dim)
        looked_up = inventory.tied and any(la.input is None for la in inventory.layers)
        head = None if looked_up else Linear("head", vocabulary, hidden)
        return cls(inventory, hidden, attention, head)

    def shape(self, storages: Mapping[Layer, Storage]) -> ModelShape:
        """Give the shape of the model under a policy."""
        blocks: list[list[Layer]] = [[] for _ in self.inventory.blocks]
        head = self.head
        for layer, storage in storages.items():
            if layer.block is not None:
                blocks[layer.block].append(layer)
            elif layer.input is None and head is None:  # the embedding is the head
                head = replace(self._as_head(layer, storage), name="head")
        made = (self._block(layers, storages) for layers in blocks)
        return ModelShape(tuple(made), head, self.hidden)

    def _as_head(self, layer: Layer, storage: Storage) -> Linear:
        return next(iter(linears_of(layer, storage)), Linear("head", *layer.shape))

    def _block(
        self, layers: Sequence[Layer], storages: Mapping[Layer, Storage]
    ) -> Block:
        attention, channels, gone = self.attention, 0, set[str]()
        for layer in layers:
            storage = storages[layer]
            if closes(layer, "heads"):
                attention = self.attention_left(layer, storage)
            if closes(layer, "channels"):
                channels = channels_left(layer, storage)
            if layer.cut is not None and layer.cut.axis == "columns":
                gone |= set() if storage.kept else {layer.cut.kind}
        linears = (one for la in layers for one in linears_of(la, storages[la]))
        return Block(tuple(linears), attention, 1.0 - SIDE * len(gone), channels)

    def attention_left(self, layer: Layer, storage: Storage) -> Attention | None:
        """Say what is left of an attention, from the layer that takes its heads."""
        if self.attention is None or not storage.kept:
            return None
        if storage.units is None or layer.cut is None:
            return self.attention
        share = storage.units / layer.cut.units
        whole = self.attention
        heads, kv_heads = round(whole.heads * share), round(whole.kv_heads * share)
        return replace(whole, heads=heads, kv_heads=max(kv_heads, 1))


def channels_left(layer: Layer, storage: Storage) -> int:
    """Say how wide an MLP is left, from the layer that takes its channels."""
    assert layer.cut is not None, layer.name
    units = layer.cut.units if storage.units is None else storage.units
    return units * layer.cut.unit if storage.kept else 0


def closes(layer: Layer, kind: str) -> bool:
    """Tell whether a layer takes what its structure makes: an ``o`` or a ``down``."""
    cut = layer.cut
    return cut is not None and cut.kind == kind and cut.axis == "columns"


def _is_two_of_four(storage: Storage) -> bool:
    """Tell whether a mask keeps at most two of any four weights in a row."""
    if storage.mask is None or ":" not in storage.mask or storage.permuted:
        return False
    keep, of = (int(number) for number in storage.mask.split(":"))
    return keep * 2 <= of and of in (2, 4)
