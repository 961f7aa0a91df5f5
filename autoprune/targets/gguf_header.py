"""Key-values and tensor table of a GGUF file, and its exact size before it is written.

Sizes are taken from the writer itself, which writes all that is not data into memory:
so what is told and what is written cannot drift apart.
"""

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from gguf import (
    GGUF_DEFAULT_ALIGNMENT,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)
from gguf.constants import GGML_QUANT_VERSION
from gguf.gguf_writer import WriterState
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from autoprune.targets.gguf_blocks import Kind
from autoprune.targets.gguf_families import head_dim, rope
from autoprune.targets.gguf_model import Entry, GgufModel
from autoprune.targets.gguf_tokenizer import Vocabulary
from autoprune.targets.per_layer_blocks import Block

_FILE_TYPES = {
    Kind.F32: LlamaFileType.ALL_F32,
    Kind.F16: LlamaFileType.MOSTLY_F16,
    Kind.BF16: LlamaFileType.MOSTLY_BF16,
    Kind.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Kind.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    Kind.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Kind.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
}
"""What people are told of a file, by the type that most of its bytes have."""


def writer_of(
    known: GgufModel,
    blocks: tuple[Block, ...],
    entries: Sequence[Entry],
    *,
    arch: MODEL_ARCH,
    path: Any = None,
) -> GGUFWriter:
    """Make the writer of a file, with all but the tokenizer's key-values.

    Args:
        known: The model.
        blocks: What stays of it.
        entries: The tensors.
        arch: The architecture; ``deci`` has the widths of every block.
        path: Of the file; None to measure it only.
    """
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    config, settings = known.config, rope(known.config)
    shared = config.num_attention_heads // config.num_key_value_heads
    widths: dict[str, Any] = {
        "heads": [block.heads * shared for block in blocks],
        "groups": [block.heads for block in blocks],
        "channels": [block.channels for block in blocks],
    }
    if arch is not known.family.uneven:
        widths = {name: (values or [0])[0] for name, values in widths.items()}
    writer.add_type("model")
    writer.add_block_count(len(blocks))
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths["channels"])
    writer.add_head_count(widths["heads"])
    writer.add_head_count_kv(widths["groups"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(settings.get("rope_theta", 10000.0))
    if settings.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings["factor"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(_file_type(entries))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for entry in entries:
        # Any type but uint8, for which the writer takes the shape to be in bytes.
        dtype = np.dtype(np.float32)
        shape, kind = entry.shape, entry.kind
        writer.add_tensor_info(entry.name, shape, dtype, entry.nbytes, raw_dtype=kind)
    return writer


def context_length(config: Any) -> int:
    """Tell how many tokens a model can look back on, at most.

    llama.cpp lets every token see all before it in these architectures. Up to the width
    of a sliding window that is the same, so a longer context is not offered.
    """
    window = getattr(config, "sliding_window", None)
    longest = int(config.max_position_embeddings)
    return min(longest, int(window)) if window else longest


def rope_factors(config: Any) -> Float[Tensor, " half"]:
    """Tell by what each rotary frequency is divided, as transformers scales it."""
    settings, size = rope(config), head_dim(config)
    scaled, _ = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, "cpu")
    powers = torch.arange(0, size, 2, dtype=torch.float64) / size
    factors: Tensor = settings["rope_theta"] ** -powers / scaled.double()
    return factors.float()


def header_bytes(writer: GGUFWriter) -> int:
    """Count the bytes of all that is no data, before padding."""
    sink = BytesIO()
    writer.fout, writer.state = [sink], WriterState.EMPTY  # type: ignore[list-item]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return len(sink.getvalue())


def tokenizer_bytes(tokenizer: Vocabulary) -> int:
    """Count the bytes of a tokenizer's key-values."""
    empty, full = GGUFWriter(None, ""), GGUFWriter(None, "")
    tokenizer.add_to(full)
    return header_bytes(full) - header_bytes(empty)


def padded(count: int) -> int:
    """Round up to where the next tensor may begin."""
    return -(-count // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def data_bytes(entries: Iterable[Entry]) -> int:
    """Count the bytes of all tensors."""
    return sum(padded(entry.nbytes) for entry in entries)


def table_bytes(entry: Entry) -> int:
    """Count the bytes of a tensor's line in the table: name, axes, type and place."""
    return 8 + len(entry.name.encode()) + 4 + 8 * len(entry.shape) + 4 + 8


def _file_type(entries: Iterable[Entry]) -> LlamaFileType:
    sizes: dict[Kind, int] = {}
    for entry in entries:
        sizes[entry.kind] = sizes.get(entry.kind, 0) + entry.nbytes
    most = max(sizes, key=lambda kind: sizes[kind], default=Kind.F32)
    return _FILE_TYPES[most]
