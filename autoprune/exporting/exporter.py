"""What an export target is: the abstract base that a plugin finishes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from autoprune.compression.storage import Part, Storage
from autoprune.compression.variant import Variant
from autoprune.exporting.weight_files import (
    SHARD_BYTES,
    header_bytes,
    weight_file_bytes,
)
from autoprune.models.checkpoints import Checkpoint
from autoprune.models.layers import Inventory
from autoprune.policy import Action, Layer

Digests = dict[str, str]
"""SHA-256 of what each layer will weigh once loaded, by its name in that model."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a model that is loaded again may be from the one that was measured.

    Attributes:
        perplexity: Relative difference.
        logits: Largest difference of a log-probability, in nats; None where the format
            computes differently, as with rounded activations.
        why: What the difference comes from; empty where there should be none.
        in_float32: True if log-probabilities are compared in float32, where another
            order of sums hardly matters; bfloat16 may be a whole nat apart.
    """

    perplexity: float
    logits: float | None
    why: str = ""
    in_float32: bool = False


EXACT = Bounds(1e-3, 0.05)
"""For the same weights in the same code.

On one machine the two agree bit for bit (measured). The bounds leave room for another
machine, which adds bfloat16 products in another order: so much bfloat16 differs from
float32 where it counts as the same here.
"""

CUT = Bounds(1e-3, 0.05, "fewer zeros are added, in another order", in_float32=True)
"""Where units of zeros were left out, which changes how sums are rounded."""

ROTATED = Bounds(1e-2, None, "the hidden state was rotated, and weights rounded again")
"""Measured in bfloat16: 0.0008 on SmolLM2-135M, 0.005 on a random model of width 64."""


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
        loads_in: The runtimes that load it, in one line, for people.
        fuses: True if runtimes take the layers of a site as one, so that all of them
            have to be stored alike.
        weights: False for a format that only describes a policy, for another tool to
            apply: it has no size, cannot be loaded and cannot be a search's target.
        shard_bytes: Most bytes of tensors in one weight file.
    """

    name: ClassVar[str]
    stores: ClassVar[str]
    loads_in: ClassVar[str]
    fuses: ClassVar[bool] = False
    weights: ClassVar[bool] = True
    shard_bytes: int = SHARD_BYTES

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

    def refuses_policy(
        self, storages: Mapping[Layer, Storage], inventory: Inventory
    ) -> str | None:
        """Say why the format cannot hold layers so stored together, or None.

        Asked before any work for an export starts. By default layers that a runtime
        fuses have to be stored alike.
        """
        if not self.fuses:
            return None
        for site in inventory.sites:
            kinds = {layer: _format_of(storages[layer]) for layer in site.layers}
            first, *others = site.layers
            for other in others:
                if kinds[other] != kinds[first]:
                    return (
                        f"{other.name} is stored as {kinds[other]} and {first.name} as "
                        f"{kinds[first]}, but runtimes take the layers of {site.name} "
                        "as one. Give them one action, or export as packed"
                    )
        return None

    def bounds(self, storages: Mapping[Layer, Storage]) -> Bounds:
        """Tell how far the loaded model may be from the one that was measured."""
        return EXACT

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
        # Greedy files are half full at least, and each has a head of some 64 bytes.
        heads = sum(128 * p.nbytes // self.shard_bytes for p in tensors.values())
        return heads + sum(p.nbytes + header_bytes(n, p) for n, p in tensors.items())

    def size_bytes(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> int:
        """Tell the exact size of the weight files.

        Args:
            storages: What each layer stores.
            untouched: Every other tensor of the model.
        """
        tensors = self.declared(storages, untouched)
        return weight_file_bytes(tensors, self.metadata(), limit=self.shard_bytes)

    def declared(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> dict[str, Part]:
        """Name every tensor in the order in which it is written; see ``size_bytes``."""
        tensors = dict(untouched)
        for layer in in_order(storages):
            tensors |= self.tensors(layer, storages[layer])
        return tensors

    def usage(self, folder: str, auto_class: str) -> str:
        """Give the lines that load an export: Python, or a command of a shell.

        Args:
            folder: As it shall stand there.
            auto_class: The class of transformers that loads the model.
        """
        return f'import autoprune\n\nmodel = autoprune.load("{folder}")'

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell a user what a policy becomes in this format; by default nothing."""
        return []

    def written_bytes(self, folder: Path) -> int:
        """Add up the weight files of an export: what ``size_bytes`` predicts."""
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    @abstractmethod
    def write(self, folder: Path, job: ExportJob) -> Digests:
        """Write the model's files into an existing, empty folder.

        No more is held than one weight file's tensors and one layer.

        Returns:
            What ``load`` has to give for each layer, told from the variants and not
            from the files; layers whose weights are not known to the bit are left out.

        Raises:
            ExportError: If the disk is full or the format cannot hold the model.
        """

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Read the model back, ready to run in plain transformers.

        Raises:
            ExportError: If a file is missing, damaged or of another format.
        """


def in_order(layers: Iterable[Layer]) -> list[Layer]:
    """Sort layers as they stand in the model, whatever a policy names first."""
    first = -1  # the embedding's
    return sorted(
        layers, key=lambda la: (first if la.block is None else la.block, la.name)
    )


def _format_of(storage: Storage) -> str:
    """Tell what a runtime has to know to read a layer, whatever its size."""
    if storage.bits is None:
        return "values"
    group = f" in groups of {storage.group}" if storage.group else ""
    zeros = "" if storage.symmetric else " with zero points"
    return f"{storage.code}, {storage.bits} bits{group}{zeros}"
