"""The target ``packed``: AutoPrune's own layout, which stores what a policy keeps.

The weights are in ``packed.safetensors``: for each layer the parts of its variant,
named ``<layer>.<part>``, and every other tensor under its own name, tied ones once. It
is not called ``model.safetensors`` because plain transformers would open that, find
none of the layers, and go on with random ones after a mere warning.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from autoprune.compression.storage import Part, Storage
from autoprune.compression.variant import Variant
from autoprune.errors import ExportError, ModelError
from autoprune.exporting.exporter import Exporter, ExportJob
from autoprune.exporting.marker import MARKER, read_marker, write_marker
from autoprune.hookspecs import hookimpl
from autoprune.models.biases import bias_of, put_bias
from autoprune.models.checkpoints import load_model
from autoprune.models.layers import untouched_parameters, write_weight
from autoprune.models.loading import first_line, quiet
from autoprune.models.weights import dtype_name, parameter_of
from autoprune.policy import DENSE, Layer

WEIGHTS = "packed.safetensors"
"""Name of the weight file."""

_NEEDS = {"auto_class": str, "dtype": str, "sha256": str, "layers": dict}


class Packed(Exporter):
    """Values, masks, codes and scales as the variants hold them."""

    name = "packed"
    stores = "kept values, masks, codes, scales; nothing for a zero but its mask"

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name the parts of a layer's variant."""
        return {f"{layer.name}.{name}": part for name, part in storage.parts.items()}

    def metadata(self) -> dict[str, str]:
        """Say that the tensors are torch's."""
        return {"format": "pt"}

    def write(self, folder: Path, job: ExportJob) -> None:
        """Write the weights, the configuration and the marker.

        Raises:
            ExportError: If a variant stores something else than was declared, or the
                disk is full.
        """
        model = load_model(job.checkpoint, job.auto_class)
        untouched, state = (
            untouched_parameters(model, job.inventory),
            model.state_dict(),
        )
        tensors = {name: state[name].contiguous() for name in untouched}
        for layer in job.inventory.layers:
            for part, tensor in _pack(layer, job).items():
                tensors[f"{layer.name}.{part}"] = tensor
        safetensors.torch.save_file(tensors, folder / WEIGHTS, self.metadata())
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype  # a checkpoint's own may be wrong
        model.config.save_pretrained(folder)
        layers = {
            layer.name: {
                "action": str(job.actions.get(layer, DENSE)),
                **asdict(storage),
            }
            for layer, storage in job.storages.items()
        }
        write_marker(
            folder,
            target=self.name,
            auto_class=job.auto_class,
            dtype=dtype_name(next(model.parameters())),
            sha256=_sha256(folder / WEIGHTS),
            layers=layers,
        )

    def load(self, folder: Path) -> PreTrainedModel:
        """Read the model back, every layer at full size.

        Raises:
            ExportError: If a file is missing, damaged, newer or of another target.
        """
        marker = read_marker(folder, target=self.name, needs=_NEEDS)
        storages = _storages(folder, marker)
        tensors = _read(folder / WEIGHTS, marker["sha256"])
        parts = {
            layer: {
                name: _take(tensors, f"{layer.name}.{name}", part, folder / WEIGHTS)
                for name, part in storage.parts.items()
            }
            for layer, storage in storages.items()
        }
        model = _build(folder, marker, tensors=tensors, layers=list(storages))
        for layer, storage in storages.items():
            weight = Variant.unpack(storage, parts[layer]).weight
            try:
                write_weight(model, layer, weight)
                put_bias(model, layer, bias_of(weight))
            except ModelError as error:
                raise ExportError(
                    f"{folder / WEIGHTS} does not fit config.json: {error}"
                ) from error
        return model


def _pack(layer: Layer, job: ExportJob) -> dict[str, Tensor]:
    variant = job.variant(layer)
    if variant.storage != job.storages[layer]:
        raise ExportError(
            f"the variant of {layer.name!r} stores {variant.storage}, but "
            f"{job.storages[layer]} was declared. The method "
            f"{str(job.actions.get(layer, DENSE))!r} breaks its contract."
        )
    return variant.pack()


def _storages(folder: Path, marker: Mapping[str, Any]) -> dict[Layer, Storage]:
    """Read what each layer stores."""
    storages = {}
    for name, fields in marker["layers"].items():
        try:
            fields = {key: fields[key] for key in fields if key != "action"}
            storage = Storage(**{**fields, "shape": tuple(fields["shape"])})
            getattr(torch, storage.dtype)
            assert storage.parts  # reads every field
        except Exception as error:  # whatever a person's hand has left there
            raise ExportError(
                f"{folder / MARKER} is damaged: layer {name!r} stores {fields!r} "
                f"({first_line(error)}). Export the model again."
            ) from error
        layer = Layer(name, storage.shape, storage.dtype, None, "", None)
        storages[layer] = storage
    return storages


def _read(file: Path, sha256: str) -> dict[str, Tensor]:
    """Read all tensors, after checking that the file is what was written."""
    again = "Copy the folder again, or export the model again."
    try:
        found = _sha256(file)
        if found != sha256:
            raise ExportError(
                f"{file} is damaged: its {file.stat().st_size} bytes have SHA-256 "
                f"{found}, expected {sha256}. {again}"
            )
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise ExportError(f"cannot read {file}: {error.strerror}. {again}") from error
    except SafetensorError as error:
        raise ExportError(f"{file} is damaged: {error}. {again}") from error


def _take(tensors: dict[str, Tensor], name: str, part: Part, file: Path) -> Tensor:
    """Take one part out of what was read, as it was declared."""
    tensor = tensors.pop(name, None)
    found = None if tensor is None else Part(dtype_name(tensor), tuple(tensor.shape))
    if tensor is None or found != part:
        raise ExportError(
            f"{file} does not fit {MARKER}: {name!r} is {found}, expected {part}. "
            "Export the model again."
        )
    return tensor


def _build(
    folder: Path,
    marker: Mapping[str, Any],
    *,
    tensors: dict[str, Tensor],
    layers: list[Layer],
) -> PreTrainedModel:
    """Make the model with every tensor that is no layer's; layers are not yet written.

    transformers itself makes what no file stores, such as rotary frequencies, and ties
    what is tied.
    """
    try:
        dtype = getattr(torch, marker["dtype"])
        with quiet():
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            with torch.device("meta"):
                outline = getattr(transformers, marker["auto_class"]).from_config(
                    config, dtype=dtype, trust_remote_code=False
                )
            shapes = {name: t.shape for name, t in outline.state_dict().items()}
            empty = {
                name: torch.empty(shapes[name], dtype=dtype)
                for name in {parameter_of(layer.name) for layer in layers}
                & shapes.keys()
            }
            model, info = type(outline).from_pretrained(
                None,
                config=config,
                state_dict={**tensors, **empty},
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below
            )
    except Exception as error:  # a foreign reader on foreign bytes raises anything
        raise ExportError(
            f"transformers {transformers.__version__} cannot make the model of "
            f"{folder / 'config.json'} as {marker['auto_class']}: {first_line(error)}. "
            "Export the model again."
        ) from error
    for kind in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, info[f"{kind}_keys"])):
            raise ExportError(
                f"{folder / WEIGHTS} does not fit config.json: {len(names)} tensors "
                f"are {kind}, first {names[0]!r}. Export the model again."
            )
    _restore(model, tensors, folder)
    return model  # type: ignore[no-any-return]


def _restore(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put the tensors on the model once more, and its settings for generation.

    Once more because transformers may take them for another layout and convert them.
    """
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@hookimpl
def register_exporters() -> list[Exporter]:
    """Register it."""
    return [Packed()]
