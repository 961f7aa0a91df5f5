"""What an export target is: the abstract base, and exact sizes of safetensors files."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from autoprune.compression.storage import Part, Storage
from autoprune.compression.variant import Variant
from autoprune.models.checkpoints import Checkpoint
from autoprune.models.layers import Inventory
from autoprune.policy import Action, Layer

_TYPES = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Names of types in a safetensors header, in the order in which tensors are written."""


@dataclass(frozen=True, eq=False)
class ExportJob:
    """What is exported.

    Attributes:
        checkpoint: The dense model.
        auto_class: The class of transformers that loads it.
        inventory: Its layers.
        storages: What each layer stores; dense ones included.
        variant: Gives a layer's variant; called once a layer.
        actions: What was done to each layer, for people who read the export.
    """

    checkpoint: Checkpoint
    auto_class: str
    inventory: Inventory
    storages: Mapping[Layer, Storage]
    variant: Callable[[Layer], Variant]
    actions: Mapping[Layer, Action] = field(default_factory=dict)


class Exporter(ABC):
    """A format in which a compressed model is written.

    An exporter has no state but what ``for_model`` gives it. While a space is built,
    ``refuses`` is asked for every (layer, action); ``layer_bytes`` prices them for the
    search, and ``size_bytes`` the whole policy of a trial; ``write`` and ``load`` are
    called for the winner.

    Attributes:
        name: Unique, lower case.
        stores: What the format keeps of a variant, in one line, for people.
    """

    name: ClassVar[str]
    stores: ClassVar[str]

    def for_model(self, model: Any, inventory: Inventory) -> "Exporter":
        """Give the exporter that knows how one model is saved; by default the same.

        Call it before any size is asked for: some formats rename or split tensors, as
        only the model itself can tell.

        Args:
            model: The dense model as it was loaded, in its stored types.
            inventory: Its layers.
        """
        return self

    def refuses(self, layer: Layer, storage: Storage) -> str | None:
        """Say why the format cannot hold a layer so stored, or None if it can.

        By default only what has to be rotated, which few formats do.
        """
        if storage.hidden is None:
            return None
        return f"the target {self.name} does not rotate; the target transformers does"

    @abstractmethod
    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name the tensors that are written for a layer, with type and shape."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """Give the metadata that the weight file's header carries."""

    def layer_bytes(self, layer: Layer, storage: Storage) -> int:
        """Price one layer: its tensors with their share of the header.

        Never below the layer's part of ``size_bytes``, and at most some ten bytes a
        tensor above it, so that a sum of prices within a budget keeps the budget.
        """
        tensors = self.tensors(layer, storage)
        return sum(part.nbytes + header_bytes(n, part) for n, part in tensors.items())

    def size_bytes(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> int:
        """Tell the exact size of the weight file.

        Args:
            storages: What each layer stores.
            untouched: Every other tensor of the model.
        """
        tensors = dict(untouched)
        for layer, storage in storages.items():
            tensors |= self.tensors(layer, storage)
        return safetensors_bytes(tensors, self.metadata())

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell a user what a policy becomes in this format; by default nothing."""
        return []

    def written_bytes(self, folder: Path) -> int:
        """Add up the weight files of an export: what ``size_bytes`` predicts."""
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    @abstractmethod
    def write(self, folder: Path, job: ExportJob) -> None:
        """Write the model's files into an existing, empty folder.

        Raises:
            ExportError: If the disk is full or the format cannot hold the model.
        """

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Read the model back, ready to run in plain transformers.

        Raises:
            ExportError: If a file is missing, damaged or of another format.
        """


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
