"""Weight files in safetensors: their exact sizes beforehand, and writing by shards.

Tensors come one by one and are written as soon as those of a file are complete, so that
no more than one file's worth is held, whatever the size of the model.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from autoprune.compression.heap import give_back_free_memory
from autoprune.compression.storage import Part
from autoprune.errors import ExportError
from autoprune.models.weights import dtype_name

SHARD_BYTES = 2 * 10**9
"""Most bytes of tensors in one weight file, but for a tensor that is larger itself."""

_TYPES = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Names of types in a safetensors header, in the order in which tensors are written."""


def sharded(
    tensors: Mapping[str, Part], *, stem: str = "model", limit: int = SHARD_BYTES
) -> dict[str, list[str]]:
    """Divide tensors among weight files.

    Args:
        tensors: Type and shape of each, in the order in which they will come.
        stem: What the files are called before ``.safetensors``.
        limit: Most bytes of tensors in one file.

    Returns:
        Names of the tensors in each file.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda part: part.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=limit,
    )
    return dict(split.filename_to_tensors)


def weight_file_bytes(
    tensors: Mapping[str, Part],
    metadata: Mapping[str, str],
    *,
    limit: int = SHARD_BYTES,
) -> int:
    """Tell the size of all weight files together, to the byte."""
    return sum(
        safetensors_bytes({name: tensors[name] for name in names}, metadata)
        for names in sharded(tensors, limit=limit).values()
    )


def write_weight_files(
    folder: Path,
    tensors: Mapping[str, Part],
    given: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str],
    stem: str = "model",
    limit: int = SHARD_BYTES,
) -> list[Path]:
    """Write tensors as they come, and an index where there are several files.

    Args:
        folder: Where.
        tensors: What was declared: type and shape of each, in order.
        given: The tensors, by name, in about the same order.
        metadata: What each file's header carries.
        stem: What the files are called before ``.safetensors``.
        limit: Most bytes of tensors in one file.

    Returns:
        The weight files, in order.

    Raises:
        ExportError: If what comes is not what was declared.
    """
    files = sharded(tensors, stem=stem, limit=limit)
    home = {name: file for file, names in files.items() for name in names}
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in files}
    for name, tensor in given:
        found = Part(dtype_name(tensor), tuple(tensor.shape))
        if found != tensors.get(name):
            raise ExportError(
                f"the tensor {name!r} is {found}, but {tensors.get(name)} was "
                "declared. The exporter, or a method whose variants it writes, breaks "
                "its contract"
            )
        file = home[name]
        waiting[file][name] = tensor.contiguous()
        if len(waiting[file]) == len(files[file]):
            held = waiting.pop(file)
            safetensors.torch.save_file(held, folder / file, dict(metadata))
            del held
            give_back_free_memory()  # else the next file would stand beside this one
    if absent := [n for f in waiting for n in files[f] if n not in waiting[f]]:
        raise ExportError(f"tensors were declared and never came: {absent}")
    if len(files) > 1:
        total = sum(part.nbytes for part in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": home}
        text = json.dumps(index, indent=1) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return [folder / file for file in files]


def safetensors_bytes(tensors: Mapping[str, Part], metadata: Mapping[str, str]) -> int:
    """Tell the size of a safetensors file, to the byte.

    The file is 8 bytes, a JSON header padded to a multiple of 8, and the tensors; wider
    types come first, then names in order.

    Example:
        >>> safetensors_bytes({"a": Part("uint8", (3,))}, {})
        67
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    ranks = list(_TYPES)
    order = sorted(tensors, key=lambda name: (ranks.index(tensors[name].dtype), name))
    for name in order:
        part = tensors[name]
        header[name] = _entry(part, start)
        start += part.nbytes
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (length + 7) // 8 * 8 + start


def header_bytes(name: str, part: Part) -> int:
    """Bound the bytes that a tensor takes in a header, whatever its place in a file."""
    entry = {name: _entry(part, 10**11)}
    text = json.dumps(entry, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode()) - 1


def _entry(part: Part, start: int) -> dict[str, Any]:
    return {
        "dtype": _TYPES[part.dtype],
        "shape": list(part.shape),
        "data_offsets": [start, start + part.nbytes],
    }
