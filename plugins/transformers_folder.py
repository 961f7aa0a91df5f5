"""The target ``transformers``: a plain Hugging Face folder, which every tool opens.

Zeros and codes cost full size in it. Whole blocks that a policy drops, and channels and
heads of which every block keeps equally many, are left out of the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from autoprune.compression.permuting import refuse_permuting
from autoprune.compression.storage import Part, Storage
from autoprune.errors import ExportError, ModelError
from autoprune.exporting.cutting import Cutter, kept_units
from autoprune.exporting.digests import digest
from autoprune.exporting.exporter import (
    CUT,
    EXACT,
    ROTATED,
    Bounds,
    Digests,
    Exporter,
    ExportJob,
)
from autoprune.exporting.folding import fold
from autoprune.exporting.marker import MARKER, read_marker, write_marker
from autoprune.exporting.piecewise import Pieces
from autoprune.exporting.shrinking import Remains
from autoprune.exporting.weight_files import (
    header_bytes,
    weight_file_bytes,
    write_weight_files,
)
from autoprune.hookspecs import hookimpl
from autoprune.models.biases import put_bias
from autoprune.models.checkpoints import Checkpoint, load_model
from autoprune.models.hidden import HIDDEN
from autoprune.models.layers import Inventory, write_weight
from autoprune.models.loading import quiet
from autoprune.models.weights import dtype_name, expert_of
from autoprune.policy import Layer


class TransformersFolder(Exporter):
    """The dense model's own files with other weights in them, or a smaller model's.

    transformers saves some models under other names than they have in memory, and
    splits experts; ``for_model`` finds out. Without it, names are taken as in memory.

    What is left out depends on all layers together, so a layer has the price of a dense
    one, which bounds its part of the size. A bias goes into the architecture's own
    place for one; where that has to be switched on, all layers that the setting covers
    get one, zeros but for those that have one to store, and a layer's price counts all.

    Where an N:M pattern holds in another order of the channels of an MLP, the order is
    folded into the layers that make them, so that the tensor itself follows it.

    Args:
        cutter: What can be left out of the model, if one is known.
        layers: The model's layers.
    """

    name = "transformers"
    stores = "every weight at full size, but no whole blocks, channels or heads removed"
    loads_in = (
        "every tool that reads Hugging Face folders; zeros and codes that have full "
        "size save neither memory nor time there"
    )

    def __init__(
        self, cutter: Cutter | None = None, layers: tuple[Layer, ...] = ()
    ) -> None:
        self._cutter = cutter
        self._layers = layers
        self._sizes: dict[Remains, int] = {}

    def for_model(self, model: Any, inventory: Inventory) -> "TransformersFolder":
        """Find out how transformers saves the model, and what it can leave out."""
        return TransformersFolder(Cutter(model, inventory), inventory.layers)

    def refuses(self, layer: Layer, storage: Storage) -> str | None:
        """Say why the model's class cannot hold a layer so stored, or None."""
        if storage.hidden is not None:
            return self._cutter.narrow_misfit(storage.hidden) if self._cutter else None
        reason = refuse_permuting(layer) if storage.permuted else None
        if reason or not storage.bias or self._cutter is None:
            return reason
        return self._cutter.switches.refuses(layer)

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name what a layer has, as in memory; an expert as if it were alone."""
        expert = expert_of(layer.name)
        stem = f"{expert[0]}.{expert[2]}.{expert[1]}" if expert else layer.name
        parts = {f"{stem}.weight": Part(storage.dtype, storage.shape)}
        if storage.bias:
            parts[f"{stem}.bias"] = Part(storage.dtype, (storage.shape[0],))
        return parts

    def metadata(self) -> dict[str, str]:
        """Say that the tensors are torch's."""
        return {"format": "pt"}

    def layer_bytes(self, layer: Layer, storage: Storage) -> int:
        """Price a layer: all actions alike, but for biases and the hidden state."""
        if self._cutter is None:
            return super().layer_bytes(layer, storage)
        narrow = storage.hidden is not None  # in all layers, so that it will be cut
        shape = (storage.kept,) if narrow else storage.shape
        price = Part(storage.dtype, shape).nbytes
        if storage.bias:
            switches = self._cutter.switches
            added = switches.added(switches.needed([layer]))
            parts = {name: _part(tensor) for name, tensor in added.items()}
            price += sum(p.nbytes + header_bytes(n, p) for n, p in parts.items())
        return price

    def size_bytes(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> int:
        """Tell the size of the weight files; of parts, as if nothing were left out."""
        cutter = self._cutter
        if cutter is None:
            return super().size_bytes(storages, untouched)
        if absent := [layer for layer in self._layers if layer not in storages]:
            less = sum(Storage.dense(layer).nbytes for layer in absent)
            return self._saved_bytes(cutter, cutter.whole) - less
        return self._saved_bytes(cutter, cutter.decide(storages)[0])

    def usage(self, folder: str, auto_class: str) -> str:
        """Give the lines that load an export, with plain transformers."""
        return (
            f"from transformers import {auto_class}\n\n"
            f'model = {auto_class}.from_pretrained("{folder}", dtype="auto")'
        )

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell what is left out, and what stays as zeros all the same."""
        return self._cutter.decide(storages)[1] if self._cutter else []

    def write(self, folder: Path, job: ExportJob) -> Digests:
        """Write the model, piece by piece where transformers names it as in memory.

        A model whose hidden state is rotated, or whose experts are stored one by one,
        is made whole first and saved by transformers.

        Raises:
            ExportError: If a layer gets a bias that the model's class cannot have, or
                an order of columns that no other layer can follow.
        """
        model = load_model(job.checkpoint, job.auto_class)
        cutter = self._cutter or Cutter(model, job.inventory)
        for layer, storage in job.storages.items():
            if storage.bias and (why := cutter.switches.refuses(layer)):
                raise ExportError(
                    f"the target {self.name!r} cannot hold {layer.name}: {why}. Export "
                    "it as packed, or take an action without a bias"
                )
        remains = cutter.decide(job.storages)[0]
        renamed = _saved(cutter, remains).keys() != cutter.empty(remains)[1].keys()
        if renamed or HIDDEN in dict(remains.units):
            digests = self._write_whole(folder, model, job, cutter)
        else:
            digests = self._write_pieces(folder, Pieces.of(model, job, cutter))
        (folder / "generation_config.json").unlink(missing_ok=True)
        write_marker(folder, target=self.name, auto_class=job.auto_class)
        return digests

    def _write_pieces(self, folder: Path, pieces: Pieces) -> Digests:
        write_weight_files(
            folder,
            _saved(pieces.cutter, pieces.remains),
            pieces,
            metadata=self.metadata(),
            limit=self.shard_bytes,
        )
        small, _ = pieces.cutter.empty(pieces.remains)
        small.config.architectures = [type(small).__name__]
        small.config.dtype = pieces.model.dtype  # a checkpoint's own may be wrong
        small.config.save_pretrained(folder)
        return pieces.digests

    def _write_whole(
        self, folder: Path, model: Any, job: ExportJob, cutter: Cutter
    ) -> Digests:
        kept, orders = {}, {}
        for layer in job.inventory.layers:
            variant = job.variant(layer)
            write_weight(model, layer, variant.weight)
            put_bias(model, layer, variant.bias)
            kept[layer] = kept_units(layer, variant)
            if variant.order is not None:
                orders[layer] = variant.order
        fold(model, job.inventory, orders)
        model = cutter.cut(model, cutter.decide(job.storages)[0], kept)
        if model.can_generate():
            # Published settings are often such that transformers refuses to save them;
            # the dense model's own file is copied instead.
            model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        with quiet():
            model.save_pretrained(folder, max_shard_size=self.shard_bytes)
        state, names = model.state_dict(), cutter.empty(cutter.whole)[1]
        return {name: digest(state[name]) for name in state if name in names}

    def bounds(self, storages: Mapping[Layer, Storage]) -> Bounds:
        """Tell how far a model that is rotated or cut may be from the masked one."""
        if any(storage.hidden is not None for storage in storages.values()):
            return ROTATED
        remains = self._cutter.decide(storages)[0] if self._cutter else None
        if self._cutter and remains != self._cutter.whole:
            return CUT
        return EXACT

    def load(self, folder: Path) -> PreTrainedModel:
        """Read the model with transformers.

        A folder that AutoPrune did not write is read as a causal language model.

        Raises:
            ExportError: If a file is missing, damaged, newer or of another target.
        """
        auto_class = "AutoModelForCausalLM"
        if (folder / MARKER).exists():
            needs = {"auto_class": str}
            auto_class = read_marker(folder, target=self.name, needs=needs)[
                "auto_class"
            ]
        try:
            return load_model(Checkpoint(str(folder), folder, ""), auto_class)
        except ModelError as error:
            raise ExportError(f"cannot load the export {folder}: {error}") from error

    def _saved_bytes(self, cutter: Cutter, remains: Remains) -> int:
        """Tell how large transformers saves what remains of the model."""
        if remains not in self._sizes:
            self._sizes[remains] = weight_file_bytes(
                _saved(cutter, remains), self.metadata(), limit=self.shard_bytes
            )
        return self._sizes[remains]


def _saved(cutter: Cutter, remains: Remains) -> dict[str, Part]:
    """Tell what transformers stores of what remains, by its names on disk."""
    saved = revert_weight_conversion(*cutter.empty(remains))
    return {name: _part(tensor) for name, tensor in saved.items()}


def _part(tensor: torch.Tensor) -> Part:
    return Part(dtype_name(tensor), tuple(tensor.shape))


@hookimpl
def register_exporters() -> list[Exporter]:
    """Register it."""
    return [TransformersFolder()]
