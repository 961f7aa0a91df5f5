"""Weight files in safetensors: their exact sizes beforehand, and writing by shards.

Where each tensor stands in its file is known beforehand, as sizes are exact. Each is
written there as it comes, and none is held, whatever the size of a file or the model.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

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
    missing, opened = dict(tensors), dict[str, _WeightFile]()
    with ExitStack() as stack:
        for name, tensor in given:
            found, declared = _part(tensor), missing.pop(name, None)
            if found != declared:
                raise ExportError(
                    f"the tensor {name!r} is {found}, but {declared} was declared. The "
                    "exporter, or a method whose variants it writes, breaks its "
                    "contract"
                )
            file = home[name]
            if file not in opened:
                parts = {one: tensors[one] for one in files[file]}
                opened[file] = _WeightFile(folder / file, parts, metadata)
                stack.callback(opened[file].close)
            opened[file].put(name, tensor)
            del tensor  # before the next one is made
    if missing:
        raise ExportError(f"tensors were declared and never came: {[*missing]}")
    if len(files) > 1:
        total = sum(part.nbytes for part in tensors.values())
        _write_index(folder / f"{stem}.safetensors.index.json", home, total)
    return [folder / file for file in files]


def _write_index(path: Path, home: Mapping[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": dict(home)}
    path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


class _WeightFile:
    """A safetensors file in which each tensor is written at its place as it comes.

    It is open until the last has come.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Part], metadata: Mapping[str, str]
    ) -> None:
        head, self._places = _header(tensors, metadata)
        self._file = path.open("wb")
        self._file.write(head)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, once."""
        self._file.seek(self._places.pop(name))
        plain = tensor.detach().cpu().contiguous().flatten()
        if plain.stride() != (1,):  # expanded ones of one number or none
            plain = plain.repeat(1)
        if plain.numel():  # torch cannot view nothing as bytes
            self._file.write(plain.view(torch.uint8).numpy().data)
        if not self._places:
            self.close()

    def close(self) -> None:
        """Close the file, whole or not."""
        self._file.close()


def safetensors_bytes(tensors: Mapping[str, Part], metadata: Mapping[str, str]) -> int:
    """Tell the size of a safetensors file, to the byte.

    Example:
        >>> safetensors_bytes({"a": Part("uint8", (3,))}, {})
        67
    """
    head = _header(tensors, metadata)[0]
    return len(head) + sum(part.nbytes for part in tensors.values())


def _header(
    tensors: Mapping[str, Part], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Make what a safetensors file begins with; tell where each tensor begins.

    The file is 8 bytes, a JSON header padded to a multiple of 8, and the tensors; wider
    types come first, then names in order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start, ranks = 0, list(_TYPES)
    order = sorted(tensors, key=lambda name: (ranks.index(tensors[name].dtype), name))
    starts = {}
    for name in order:
        header[name] = _entry(tensors[name], start)
        starts[name] = start
        start += tensors[name].nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def header_bytes(name: str, part: Part) -> int:
    """Bound the bytes that a tensor takes in a header, whatever its place in a file."""
    entry = {name: _entry(part, 10**11)}
    text = json.dumps(entry, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode()) - 1


def _part(tensor: Tensor) -> Part:
    return Part(dtype_name(tensor), tuple(tensor.shape))


def _entry(part: Part, start: int) -> dict[str, Any]:
    return {
        "dtype": _TYPES[part.dtype],
        "shape": list(part.shape),
        "data_offsets": [start, start + part.nbytes],
    }
