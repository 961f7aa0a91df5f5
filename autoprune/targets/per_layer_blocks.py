"""Blocks of widths of their own: names of their tensors, and what describes them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import MistralConfig

from autoprune.compression.storage import Storage
from autoprune.policy import Layer

MODEL_TYPE = "autoprune_per_layer"
"""What such models are called; none but the class that comes with them knows it."""

PARTS = {"heads": "attention", "channels": "mlp"}
"""What a kind of structure is called in a configuration's ``skip``."""

_STEMS = {
    "attention": ("self_attn.", "input_layernorm."),
    "mlp": ("mlp.", "post_attention_layernorm."),
}
"""How the names of a part's tensors begin, those of the norm before it included."""

_DROPPED = ("architectures", "attention_bias", "layer_types", "mlp_bias", "model_type")
_DROPPED_TOO = ("pretraining_tp", "transformers_version", "_name_or_path")


@dataclass(frozen=True, slots=True)
class Block:
    """What stays of a block.

    Attributes:
        index: Of the block in the dense model.
        heads: Groups of heads that stay; 0 if there is no attention any more.
        channels: Channels that stay; 0 if there is no MLP any more.
        biases: Last names of its layers that have a bias.
    """

    index: int
    heads: int
    channels: int
    biases: tuple[str, ...] = ()

    def of(self, kind: str) -> int:
        """Tell how many units of a kind stay."""
        return self.heads if kind == "heads" else self.channels

    def units(self, layer: Layer) -> int:
        """Tell how many units of one of its layers stay."""
        assert layer.cut is not None, layer.name
        return self.of(layer.cut.kind)

    @property
    def skipped(self) -> list[str]:
        """Name the parts of which nothing stays."""
        return [part for kind, part in PARTS.items() if not self.of(kind)]


class Names:
    """Tells what tensors are called in the smaller model.

    Args:
        stem: What the names of all blocks' tensors begin with.
        blocks: What stays.
    """

    def __init__(self, stem: str, blocks: Sequence[Block]) -> None:
        self._stem = stem
        self._blocks = {b.index: (place, b) for place, b in enumerate(blocks)}

    def __call__(self, name: str) -> str | None:
        """Give the new name; None if the tensor is left out."""
        if not name.startswith(self._stem):
            return name
        index, _, rest = name.removeprefix(self._stem).partition(".")
        if int(index) not in self._blocks:
            return None
        place, block = self._blocks[int(index)]
        gone = any(rest.startswith(_STEMS[part]) for part in block.skipped)
        return None if gone else f"{self._stem}{place}.{rest}"

    def block(self, layer: Layer) -> Block:
        """Give the block of a layer that stays."""
        assert layer.block is not None, layer.name
        return self._blocks[layer.block][1]


def units_of(layer: Layer) -> int:
    """Count the units of a layer's structure in the dense model."""
    assert layer.cut is not None, layer.name
    return layer.cut.units


def cut_shape(layer: Layer, units: int) -> tuple[int, int]:
    """Give the shape of a layer with only so many units."""
    assert layer.cut is not None, layer.name
    size, (rows, columns) = layer.cut.unit * units, layer.shape
    return (size, columns) if layer.cut.axis == "rows" else (rows, size)


def smaller_config(
    dense: Any, blocks: Sequence[Block], *, groups: int, rows: int, dtype: str
) -> dict[str, Any]:
    """Give the configuration of the smaller model, as its file holds it.

    Args:
        dense: The dense model's.
        blocks: What stays.
        groups: Groups of heads in the dense model.
        rows: Outputs of its queries.
        dtype: Type of the weights.
    """
    settings = copy.deepcopy(dense).to_dict()
    for key in (*_DROPPED, *_DROPPED_TOO):
        settings.pop(key, None)
    heads = settings["num_attention_heads"]
    own = _overrides(blocks, heads // groups)
    settings |= {
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": groups,
        "head_dim": rows // heads,
        "sliding_window": settings.get("sliding_window"),  # Mistral's own is not None
        "biases": None,
        "per_layer_config": dict(enumerate(own)),
        "architectures": ["PerLayerForCausalLM"],
        "dtype": dtype,
    }
    config = MistralConfig(**settings)  # speaks up where a reader would
    return {**config.to_diff_dict(), "model_type": MODEL_TYPE}


def _overrides(blocks: Sequence[Block], shared: int) -> Iterator[dict[str, Any]]:
    """Give the settings of each block; what is as in the dense model goes by itself."""
    for block in blocks:
        own: dict[str, Any] = {"biases": sorted(block.biases) or None}
        if block.heads:
            own["num_attention_heads"] = shared * block.heads
            own["num_key_value_heads"] = block.heads
        if block.channels:
            own["intermediate_size"] = block.channels
        if block.skipped:
            own["skip"] = block.skipped
        yield own


def notes_on(
    blocks: Sequence[Block],
    full: Mapping[str, int],
    count: int,
    storages: Mapping[Layer, Storage],
) -> Iterator[str]:
    """Tell people what is left out, and what stays at full size.

    Args:
        blocks: What stays.
        full: Units of each kind in a block of the dense model.
        count: Blocks of the dense model.
        storages: What every layer stores.
    """
    stay = {block.index for block in blocks}
    if gone := [index for index in range(count) if index not in stay]:
        yield f"left out blocks {_listed(gone)} of {count}, counted from 0"
    for kind, part in PARTS.items():
        if without := [block.index for block in blocks if not block.of(kind)]:
            yield f"left out the {part} of blocks {_listed(without)}"
        some = {block.of(kind) for block in blocks} - {0}
        if some - {full[kind]}:
            name = "groups of heads" if kind == "heads" else kind
            span = " to ".join(map(str, sorted({min(some), max(some)})))
            yield f"cut {name}: {span} of {full[kind]} stay in a block"
    if len({(block.heads, block.channels) for block in blocks}) == 1:
        yield (
            "all blocks are alike: the target transformers writes the same model "
            "without code of its own"
        )
    if coded := sum(storage.bits is not None for storage in storages.values()):
        yield f"{coded} layers are quantized: their values stay at full size"


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))
