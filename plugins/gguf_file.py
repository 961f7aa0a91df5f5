"""The target ``gguf``: one file for llama.cpp and the runtimes that are built on it.

Layers keep their own codes and scales, in blocks of 32 weights; each layer has its own
type. Heads, channels and blocks that a policy removes are left out.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from autoprune.compression.storage import Part, Storage
from autoprune.errors import ExportError
from autoprune.exporting.exporter import (
    CUT,
    EXACT,
    Bounds,
    Digests,
    Exporter,
    ExportJob,
)
from autoprune.exporting.marker import read_marker, write_marker
from autoprune.hookspecs import hookimpl
from autoprune.models.checkpoints import load_model
from autoprune.models.layers import Inventory
from autoprune.policy import Layer
from autoprune.targets.gguf_blocks import is_rounded
from autoprune.targets.gguf_model import GgufModel
from autoprune.targets.gguf_outcome import notes, plain_config, whole_config
from autoprune.targets.gguf_reading import MODEL_FILE, load_plainly, load_whole
from autoprune.targets.gguf_sizes import GgufSizes
from autoprune.targets.gguf_writing import GgufTensors

_NEEDS = {"dtype": str, "whole": bool, "tensors": dict, "sites": dict, "left_out": list}

_ROUNDED = Bounds(5e-3, 0.5, "scales or minima of blocks are rounded to float16")
"""By at most 2^-11 of themselves.

Measured on SmolLM2-135M, with all blocks in 4 bits of HQQ: 0.0011 and 0.06 in float32;
in bfloat16 weights round to neighbours, and logits have steps of 0.125.
"""


class GgufFile(Exporter):
    """GGUF, with a type for each layer by what its variant stores.

    What the loaded model weighs is compared in the type of the dense model. llama.cpp
    itself does not round a product of code and scale to that type, and on a CPU it
    rounds what a quantized layer reads to 8 bits.

    Args:
        known: What becomes of one model, once a model is known.
    """

    name = "gguf"
    stores = "each layer's own codes and scales in blocks of 32, or its values"
    loads_in = (
        "llama.cpp, by llama-cpp-python (tried); Ollama and LM Studio, which are built "
        "on it, SGLang, and vLLM by vllm-gguf-plugin (not tried)"
    )

    def __init__(self, known: GgufModel | None = None) -> None:
        self._known = known
        self._sizes = GgufSizes(known) if known else None

    def for_model(self, model: Any, inventory: Inventory) -> "GgufFile":
        """Find out what llama.cpp can run of a model."""
        return GgufFile(GgufModel(model, inventory))

    def refuses(self, layer: Layer, storage: Storage) -> str | None:
        """Say why a layer so stored cannot be written, or None."""
        if (reason := super().refuses(layer, storage)) or self._known is None:
            return reason
        return self._known.misfit or self._known.refuses(layer, storage)

    def refuses_policy(
        self, storages: Mapping[Layer, Storage], inventory: Inventory
    ) -> str | None:
        """Say why llama.cpp cannot run the layers together, or None."""
        known = self._known
        return (known.misfit or known.refuses_policy(storages)) if known else None

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name a layer as if its values were stored; see ``layer_bytes``."""
        return {f"{layer.name}.weight": Part(storage.dtype, storage.shape)}

    def metadata(self) -> dict[str, str]:
        """Give none: what a GGUF file tells of itself is no such metadata."""
        return {}

    def layer_bytes(self, layer: Layer, storage: Storage) -> int:
        """Price a layer: its blocks, its bias, and its lines in the table."""
        if self._sizes is None or self._sizes.misfit:
            return super().layer_bytes(layer, storage)
        return self._sizes.of_layer(layer, storage)

    def size_bytes(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> int:
        """Tell the exact size of the file, tokenizer included.

        Of some layers only, or of what is refused, it is what would be written at most.
        """
        if self._sizes is None or self._sizes.misfit:
            return super().size_bytes(storages, untouched)
        return self._sizes.of_file(storages)

    def written_bytes(self, folder: Path) -> int:
        """Tell the size of the file."""
        return (folder / MODEL_FILE).stat().st_size

    def usage(self, folder: str, auto_class: str) -> str:
        """Give the command that runs it in llama.cpp."""
        return f"llama-cli -m {folder}/{MODEL_FILE}"

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell what is left out, and which layers change their form."""
        known = self._known
        return notes(known, storages) if known and not known.misfit else []

    def bounds(self, storages: Mapping[Layer, Storage]) -> Bounds:
        """Tell how far scales in float16, and a smaller model, may lead."""
        known = self._known
        rounded = any(is_rounded(storage) for storage in storages.values())
        found = [_ROUNDED] if rounded else []
        if known and not known.misfit and known.parts.is_cut(storages):
            # Else the units that were left out are zeros again once loaded.
            found += [CUT] if plain_config(known, storages) else []
        if not found:
            return EXACT
        why = "; ".join(one.why for one in found)
        logits = sum(one.logits or 0.0 for one in found)
        in_float32 = any(one.in_float32 for one in found)
        return Bounds(sum(one.perplexity for one in found), logits, why, in_float32)

    def write(self, folder: Path, job: ExportJob) -> Digests:
        """Write the file, and a configuration that tells all that it leaves out.

        Raises:
            ExportError: If llama.cpp could not run it, or a layer's scales do not fit.
        """
        model: Any = load_model(job.checkpoint, job.auto_class)
        known = GgufModel(model, job.inventory)
        self._check(known, job)
        config = plain_config(known, job.storages)
        whole = config is None
        tensors = GgufTensors(model, job, known, whole=whole)
        tensors.write(folder / MODEL_FILE)
        config = config or whole_config(known, job.storages)
        config.dtype = model.dtype
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        write_marker(
            folder,
            target=self.name,
            dtype=str(model.dtype).removeprefix("torch."),
            whole=whole,
            tensors={name: asdict(place) for name, place in tensors.places.items()},
            sites=tensors.sites,
            left_out=tensors.left_out,
        )
        return tensors.digests

    def load(self, folder: Path) -> Any:
        """Read the model with transformers, or into the dense model's shapes.

        Raises:
            ExportError: If a file is missing, damaged, newer or of another target.
        """
        marker = read_marker(folder, target=self.name, needs=_NEEDS)
        dtype = getattr(torch, marker["dtype"], torch.float32)
        if marker["whole"]:
            return load_whole(folder, dtype, marker)
        return load_plainly(folder, dtype)

    def _check(self, known: GgufModel, job: ExportJob) -> None:
        reasons = [known.misfit] if known.misfit else []
        for layer, storage in job.storages.items() if not reasons else ():
            why = super().refuses(layer, storage) or known.refuses(layer, storage)
            reasons += [f"{layer.name}: {why}"] if why else []
        if not reasons and (why := known.refuses_policy(job.storages)):
            reasons = [why]
        if reasons:
            raise ExportError(f"cannot export {job.checkpoint.source}: {reasons[0]}")


@hookimpl
def register_exporters() -> list[Exporter]:
    """Register it."""
    return [GgufFile()]
