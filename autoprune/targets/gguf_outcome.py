"""What a policy becomes in GGUF: configurations to load it, notes for people."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from autoprune.compression.storage import Storage
from autoprune.exporting.shrinking import Remains, shrunk_config
from autoprune.policy import Layer
from autoprune.targets.gguf_blocks import Kind, is_rounded, kind_of
from autoprune.targets.gguf_header import context_length
from autoprune.targets.gguf_model import GgufModel
from autoprune.targets.per_layer_blocks import PARTS, Block

_BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q5_0: 5, Kind.Q5_1: 5, Kind.Q8_0: 8}


def plain_config(known: GgufModel, storages: Mapping[Layer, Storage]) -> Any | None:
    """Give the configuration of what transformers loads from the file by itself.

    Returns:
        None where its own reader gives no such model: blocks of different widths,
        Mistral, biases that the model had not, or a number of heads that the class of
        its configuration refuses.
    """
    blocks = known.parts.blocks(storages)
    plain = known.arch(blocks) is known.family.arch and known.family.known
    if not plain or known.biases(storages):
        return None
    full = known.parts.blocks({})
    units = [
        (kind, blocks[0].of(kind))
        for kind in PARTS
        if blocks[0].of(kind) < full[0].of(kind)
    ]
    remains = Remains(tuple(block.index for block in blocks), tuple(units))
    try:
        return shrunk_config(known.config, remains, known.inventory)
    except Exception:  # a foreign class refuses a configuration as it may
        return None


def whole_config(known: GgufModel, storages: Mapping[Layer, Storage]) -> Any:
    """Give the configuration of the dense model, with biases where some were added."""
    config = copy.deepcopy(known.config)
    for name in known.biases(storages):
        setattr(config, name, True)
    return config


def notes(known: GgufModel, storages: Mapping[Layer, Storage]) -> list[str]:
    """Tell people what is left out, and which layers change their form."""
    blocks = known.parts.blocks(storages)
    return [
        *_left_out(known, blocks),
        *_forms(storages),
        *_context(known),
    ]


def _left_out(known: GgufModel, blocks: tuple[Block, ...]) -> Iterator[str]:
    full = known.parts.blocks({})
    stay = {block.index for block in blocks}
    if gone := [str(one.index) for one in full if one.index not in stay]:
        yield f"left out blocks {', '.join(gone)} of {len(full)}, counted from 0"
    if without := [str(block.index) for block in blocks if not block.heads]:
        yield f"left out the attention of blocks {', '.join(without)}"
    told = {"heads": "groups of heads", "channels": "channels"}
    for kind, name in told.items():
        counts = {block.of(kind) for block in blocks} - {0}
        most = full[0].of(kind)
        if counts and counts != {most}:
            few, many = min(counts), max(counts)
            span = f"{few} to {many}" if few < many else f"{few}"
            yield f"cut {name}: {span} of {most} stay in a block"
    if known.arch(blocks) is not known.family.arch:
        yield (
            "blocks differ in width: the architecture is deci, which llama.cpp runs, "
            "and transformers does not"
        )


def _forms(storages: Mapping[Layer, Storage]) -> Iterator[str]:
    larger: Counter[tuple[int, str]] = Counter()
    rounded = 0
    for storage in storages.values():
        kind = kind_of(storage)
        rounded += is_rounded(storage)
        if storage.bits and kind in _BITS and _BITS[kind] > storage.bits:
            larger[storage.bits, kind.name] += 1
    for (bits, name), count in sorted(larger.items()):
        yield f"{count} layers of {bits} bits are stored in the larger blocks of {name}"
    if rounded:
        yield (
            f"scales or minima of {rounded} layers are rounded to float16, by at most "
            "1 part in 2048"
        )
    masked = [one for one in storages.values() if one.mask and one.units is None]
    if zeros := sum(one.kept > 0 for one in masked):
        yield f"zeros in {zeros} layers are stored like other weights"


def _context(known: GgufModel) -> Iterator[str]:
    longest = context_length(known.config)
    if longest < known.config.max_position_embeddings:
        yield (
            f"the context is {longest} tokens, the width of the sliding window, which "
            "llama.cpp does not slide here"
        )
