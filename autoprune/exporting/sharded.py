"""A target whose runtime divides every layer among several GPUs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoprune.compression.storage import Part, Storage
from autoprune.exporting.exporter import Bounds, Digests, Exporter, ExportJob
from autoprune.exporting.parallel import TensorParallel
from autoprune.models.layers import Inventory
from autoprune.policy import Layer

_ABOUT = ("name", "stores", "loads_in", "fuses", "weights", "shard_bytes")


class Sharded(Exporter):
    """Another target, which also refuses what GPUs cannot share.

    What is written is the same: servers divide a model when they load it.

    Args:
        target: The target; it knows the model already.
        parallel: How the model is divided.
    """

    def __init__(self, target: Exporter, parallel: TensorParallel) -> None:
        self._target = target
        self._parallel = parallel
        for name in _ABOUT:
            setattr(self, name, getattr(target, name))

    def for_model(self, model: Any, inventory: Inventory) -> "Sharded":
        """Give the target that knows another model, divided among as many GPUs."""
        parallel = TensorParallel.of(model, inventory, self._parallel.ways)
        return Sharded(self._target.for_model(model, inventory), parallel)

    def refuses(self, layer: Layer, storage: Storage) -> str | None:
        """Say why the target, or a GPU's share, cannot be so stored, or None."""
        if reason := self._target.refuses(layer, storage):
            return reason
        return self._parallel.refuses(layer, storage, self._target)

    def refuses_policy(
        self, storages: Mapping[Layer, Storage], inventory: Inventory
    ) -> str | None:
        """Say why the target cannot hold layers so stored together, or None."""
        return self._target.refuses_policy(storages, inventory)

    def bounds(self, storages: Mapping[Layer, Storage]) -> Bounds:
        """Tell how far the loaded model may be from the one that was measured."""
        return self._target.bounds(storages)

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name the tensors that are written for a layer."""
        return self._target.tensors(layer, storage)

    def metadata(self) -> dict[str, str]:
        """Give the metadata of weight files."""
        return self._target.metadata()

    def layer_bytes(self, layer: Layer, storage: Storage) -> int:
        """Price one layer."""
        return self._target.layer_bytes(layer, storage)

    def size_bytes(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> int:
        """Tell the exact size of the weight files, of all GPUs together."""
        return self._target.size_bytes(storages, untouched)

    def declared(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> dict[str, Part]:
        """Name every tensor in the order in which it is written."""
        return self._target.declared(storages, untouched)

    def usage(self, folder: str, auto_class: str) -> str:
        """Give the lines that load an export."""
        return self._target.usage(folder, auto_class)

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell what the target does, and among how many GPUs it divides."""
        ways = f"{self._parallel.ways} GPUs can share every layer (tensor parallelism)"
        return [*self._target.notes(storages), ways]

    def written_bytes(self, folder: Path) -> int:
        """Add up the weight files of an export."""
        return self._target.written_bytes(folder)

    def write(self, folder: Path, job: ExportJob) -> Digests:
        """Write the model's files."""
        return self._target.write(folder, job)

    def load(self, folder: Path) -> Any:
        """Read the model back."""
        return self._target.load(folder)


def sharded(
    exporters: Mapping[str, Exporter], model: Any, inventory: Inventory, ways: int
) -> dict[str, Exporter]:
    """Let targets know a model, and keep to what so many GPUs can share of it.

    Raises:
        ConfigError: If so many cannot share the dense model.
    """
    known = {name: one.for_model(model, inventory) for name, one in exporters.items()}
    if ways == 1:  # it takes anything
        return known
    parallel = TensorParallel.of(model, inventory, ways)
    return {name: Sharded(one, parallel) for name, one in known.items()}
