"""The target ``per-layer``: a Hugging Face folder, its blocks as wide as each needs.

Plain checkpoints want every block equally wide; here each block keeps just the channels
and heads that its policy keeps. The class that runs such a model comes with the folder,
in a short file of Python, so that transformers has to be told to trust it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from autoprune.compression.permuting import refuse_permuting
from autoprune.compression.storage import Part, Storage
from autoprune.errors import ExportError, ModelError
from autoprune.exporting.exporter import (
    CUT,
    EXACT,
    Bounds,
    Digests,
    Exporter,
    ExportJob,
)
from autoprune.exporting.marker import read_marker, write_marker
from autoprune.exporting.weight_files import write_weight_files
from autoprune.hookspecs import hookimpl
from autoprune.models.checkpoints import load_model
from autoprune.models.layers import Inventory
from autoprune.models.loading import load_strictly
from autoprune.models.weights import dtype_name
from autoprune.policy import Layer
from autoprune.targets.per_layer import PerLayerModel
from autoprune.targets.per_layer_writing import PerLayerTensors

UNEVEN = replace(CUT, perplexity=5e-3)
"""Where every block is cut to another width. Measured in bfloat16: 0.0012 on
SmolLM2-135M whose blocks differ, 0.0006 where all are cut alike."""

CODE = "modeling_per_layer.py"
"""Name of the file that holds the class."""

AUTO_CLASS = "AutoModelForCausalLM"

AUTO_MAP = {
    "AutoConfig": "modeling_per_layer.PerLayerConfig",
    "AutoModel": "modeling_per_layer.PerLayerModel",
    AUTO_CLASS: "modeling_per_layer.PerLayerForCausalLM",
}
"""Where a configuration says that the classes are."""


class PerLayerFolder(Exporter):
    """Llama's and Mistral's models, each block cut to what it keeps.

    Heads go in whole groups that share keys and values. Blocks of which nothing stays
    are left out, and so is an attention or an MLP alone. Other zeros, and codes, cost
    full size, as in the target ``transformers``. An order of channels that an N:M
    pattern follows is folded into the layers that make them.

    Runtimes: transformers runs it (tried, generation with a cache included). vLLM's
    Transformers backend reads the number of heads of each block from
    ``per_layer_config``, and widths from the layers, by its source; not tried, nor is
    an attention left out alone. SGLang's fallback to transformers takes one number of
    heads for all blocks, by its source.

    Args:
        known: How one model's blocks can be cut, once a model is known.
    """

    name = "per-layer"
    stores = "every block as wide as what it keeps, blocks and parts left out; values"
    loads_in = (
        "transformers with trust_remote_code (tried); vLLM's Transformers backend, and "
        "SGLang's where all blocks keep equally many heads (sources read, not tried)"
    )

    def __init__(self, known: PerLayerModel | None = None) -> None:
        self._known = known

    def for_model(self, model: Any, inventory: Inventory) -> "PerLayerFolder":
        """Find out how the model's blocks can be cut."""
        return PerLayerFolder(PerLayerModel(model, inventory))

    def refuses(self, layer: Layer, storage: Storage) -> str | None:
        """Say why a layer so stored cannot be written, or None."""
        if self._known is not None and self._known.misfit:
            return self._known.misfit
        if storage.permuted and (why := refuse_permuting(layer)):
            return why
        return super().refuses(layer, storage)

    def refuses_policy(
        self, storages: Mapping[Layer, Storage], inventory: Inventory
    ) -> str | None:
        """Say why the layers cannot be written together, or None."""
        known = self._known
        if known is None:
            return None
        return known.misfit or known.refuses_policy(storages)

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name what is written of a layer at most; see ``declared``."""
        if (known := self._fitting()) is not None:
            return known.most(layer, storage)
        return {f"{layer.name}.weight": Part(storage.dtype, storage.shape)}

    def declared(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> dict[str, Part]:
        """Name every tensor in the order in which it is written."""
        if (known := self._fitting()) is not None:
            return known.declared(storages, untouched)
        return super().declared(storages, untouched)

    def metadata(self) -> dict[str, str]:
        """Say that the tensors are torch's."""
        return {"format": "pt"}

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell what is left out, and that loading needs trust."""
        known = self._fitting()
        told = known.notes(storages) if known else []
        trust = f"loading runs {CODE} of the folder: pass trust_remote_code=True"
        return [*told, trust]

    def usage(self, folder: str, auto_class: str) -> str:
        """Give the lines that load it with transformers."""
        return (
            f"from transformers import {auto_class}\n\n"
            f'model = {auto_class}.from_pretrained("{folder}", trust_remote_code=True)'
        )

    def bounds(self, storages: Mapping[Layer, Storage]) -> Bounds:
        """Tell how far a model that is cut may be from the masked one."""
        known = self._fitting()
        return UNEVEN if known and known.is_cut(storages) else EXACT

    def write(self, folder: Path, job: ExportJob) -> Digests:
        """Write weights, configuration and code.

        Raises:
            ExportError: If the model is of another type, or the layers of a structure
                do not keep the same units.
        """
        model: Any = load_model(job.checkpoint, job.auto_class)
        known = PerLayerModel(model, job.inventory)
        if reason := known.misfit or known.refuses_policy(job.storages):
            raise ExportError(f"cannot export {job.checkpoint.source}: {reason}")
        tensors = PerLayerTensors(model, job, known)
        write_weight_files(
            folder,
            known.declared(job.storages, known.untouched),
            tensors,
            metadata=self.metadata(),
            limit=self.shard_bytes,
        )
        dtype = dtype_name(next(model.parameters()))
        config = {**known.config(job.storages, dtype), "auto_map": AUTO_MAP}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        (folder / CODE).write_bytes(_shipped())
        code = {CODE: _sha256(_shipped())}
        write_marker(folder, target=self.name, dtype=dtype, code=code)
        return tensors.digests

    def load(self, folder: Path) -> PreTrainedModel:
        """Read the model with transformers, once its code is known to be ours.

        Raises:
            ExportError: If a file is missing, damaged or of another target, or the code
                is not the one that this AutoPrune ships.
        """
        needs = {"code": dict, "dtype": str}
        marker = read_marker(folder, target=self.name, needs=needs)
        _check_code(folder)
        dtype = getattr(torch, marker["dtype"], torch.float32)
        try:
            return load_strictly(
                folder, AUTO_CLASS, dtype=dtype, trust_remote_code=True
            )
        except ModelError as error:
            raise ExportError(f"cannot load the export {folder}: {error}") from error

    def _fitting(self) -> PerLayerModel | None:
        """Give what is known of the model, if it is of a type that can be cut."""
        return None if self._known is None or self._known.misfit else self._known


def _check_code(folder: Path) -> None:
    """Refuse a folder that would run any other code than what AutoPrune ships.

    Raises:
        ExportError: If it would.
    """
    try:
        found = (folder / CODE).read_bytes()
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder} is damaged: {error}. Copy the folder again, or export the model "
            "again"
        ) from error
    if found != _shipped():
        raise ExportError(
            f"{folder / CODE} is not the file that this AutoPrune ships: its SHA-256 "
            f"is {_sha256(found)}, expected {_sha256(_shipped())}. Code of unknown "
            "origin is not run: export the model again, or load it with transformers "
            "if you have read the file and trust it"
        )
    if named.get("auto_map") != AUTO_MAP:
        raise ExportError(
            f"{folder / 'config.json'} takes its classes from "
            f"{named.get('auto_map')!r}, expected {AUTO_MAP}. Code of unknown origin "
            "is not run: export the model again"
        )


def _shipped() -> bytes:
    return files("autoprune.targets").joinpath(CODE).read_bytes()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@hookimpl
def register_exporters() -> list[Exporter]:
    """Register it."""
    return [PerLayerFolder()]
