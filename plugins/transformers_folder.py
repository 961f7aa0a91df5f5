"""The target ``transformers``: a plain Hugging Face folder, which every tool opens.

Zeros and codes cost full size in it. Whole blocks that a policy drops, and channels and
heads of which every block keeps equally many, are left out of the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from autoprune.compression.storage import Part, Storage
from autoprune.errors import ExportError, ModelError
from autoprune.exporting.cutting import Cutter, kept_units
from autoprune.exporting.exporter import Exporter, ExportJob, safetensors_bytes
from autoprune.exporting.marker import MARKER, read_marker, write_marker
from autoprune.exporting.shrinking import Remains
from autoprune.hookspecs import hookimpl
from autoprune.models.checkpoints import Checkpoint, load_model
from autoprune.models.layers import Inventory, write_weight
from autoprune.models.loading import quiet
from autoprune.models.weights import dtype_name, expert_of
from autoprune.policy import Layer

SHARD = "50GB"
"""Most bytes of one weight file: what transformers does by itself."""


class TransformersFolder(Exporter):
    """The dense model's own files with other weights in them, or a smaller model's.

    transformers saves some models under other names than they have in memory, and
    splits experts; ``for_model`` finds out. Without it, names are taken as in memory.

    What is left out depends on all layers together, so a layer has the price of a dense
    one, which bounds its part of the size.

    Args:
        cutter: What can be left out of the model, if one is known.
        layers: The model's layers.
    """

    name = "transformers"
    stores = "every weight at full size, but no whole blocks, channels or heads removed"

    def __init__(
        self, cutter: Cutter | None = None, layers: tuple[Layer, ...] = ()
    ) -> None:
        self._cutter = cutter
        self._layers = layers
        self._sizes: dict[Remains, int] = {}

    def for_model(self, model: Any, inventory: Inventory) -> "TransformersFolder":
        """Find out how transformers saves the model, and what it can leave out."""
        return TransformersFolder(Cutter(model, inventory), inventory.layers)

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name the layer's weight, as in memory; an expert as if it were alone."""
        expert = expert_of(layer.name)
        stem = f"{expert[0]}.{expert[2]}.{expert[1]}" if expert else layer.name
        return {f"{stem}.weight": Part(storage.dtype, storage.shape)}

    def metadata(self) -> dict[str, str]:
        """Say that the tensors are torch's."""
        return {"format": "pt"}

    def layer_bytes(self, layer: Layer, storage: Storage) -> int:
        """Price a layer: all actions alike."""
        if self._cutter is None:
            return super().layer_bytes(layer, storage)
        return Part(storage.dtype, storage.shape).nbytes

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

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell what is left out, and what stays as zeros all the same."""
        return self._cutter.decide(storages)[1] if self._cutter else []

    def write(self, folder: Path, job: ExportJob) -> None:
        """Load the dense model anew, put the variants on it and save it."""
        model = load_model(job.checkpoint, job.auto_class)
        cutter = self._cutter or Cutter(model, job.inventory)
        kept = {}
        for layer in job.inventory.layers:
            variant = job.variant(layer)
            write_weight(model, layer, variant.weight)
            kept[layer] = kept_units(layer, variant)
        model = cutter.cut(model, cutter.decide(job.storages)[0], kept)
        if model.can_generate():
            # Published settings are often such that transformers refuses to save them;
            # the dense model's own file is copied instead.
            model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        with quiet():
            model.save_pretrained(folder, max_shard_size=SHARD)
        (folder / "generation_config.json").unlink(missing_ok=True)
        write_marker(folder, target=self.name, auto_class=job.auto_class)

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
            model, state = cutter.empty(remains)
            saved = revert_weight_conversion(model, state)
            shards = split_torch_state_dict_into_shards(saved, max_shard_size=SHARD)
            self._sizes[remains] = sum(
                safetensors_bytes(
                    {name: _part(saved[name]) for name in names}, self.metadata()
                )
                for names in shards.filename_to_tensors.values()
            )
        return self._sizes[remains]


def _part(tensor: torch.Tensor) -> Part:
    return Part(dtype_name(tensor), tuple(tensor.shape))


@hookimpl
def register_exporters() -> list[Exporter]:
    """Register it."""
    return [TransformersFolder()]
