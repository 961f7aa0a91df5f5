"""The target ``packed``: AutoPrune's own layout, which stores what a policy keeps.

The weights are in ``packed.safetensors``, or in several such files with an index: for
each layer the parts of its variant, named ``<layer>.<part>``, and every other tensor
under its own name, tied ones once. They are not called ``model.safetensors`` because
plain transformers would open that, find none of the layers, and go on with random ones
after a mere warning.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from autoprune.compression.storage import Part, Storage
from autoprune.compression.variant import Variant
from autoprune.errors import ExportError, ModelError
from autoprune.exporting.digests import digest
from autoprune.exporting.exporter import Digests, Exporter, ExportJob, in_order
from autoprune.exporting.manifest import file_sha256
from autoprune.exporting.marker import MARKER, read_marker, write_marker
from autoprune.exporting.weight_files import write_weight_files
from autoprune.hookspecs import hookimpl
from autoprune.models.biases import bias_of, put_bias
from autoprune.models.checkpoints import load_model
from autoprune.models.layers import untouched_parameters, write_weight
from autoprune.models.loading import first_line, quiet
from autoprune.models.weights import dtype_name, parameter_of
from autoprune.policy import DENSE, Layer

STEM = "packed"
"""What the weight files are called before ``.safetensors``."""

WEIGHTS = f"{STEM}.safetensors"
"""Name of the weight file where one is enough."""

_NEEDS = {"auto_class": str, "dtype": str, "files": dict, "layers": dict}
_AGAIN = "Copy the folder again, or export the model again."


class Packed(Exporter):
    """Values, masks, codes and scales as the variants hold them."""

    name = "packed"
    stores = "kept values, masks, codes, scales; nothing for a zero but its mask"
    loads_in = (
        "autoprune.load, as a model of transformers; there every layer has its full "
        "size again, and zeros and codes save neither memory nor time"
    )

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name the parts of a layer's variant."""
        return {f"{layer.name}.{name}": part for name, part in storage.parts.items()}

    def metadata(self) -> dict[str, str]:
        """Say that the tensors are torch's."""
        return {"format": "pt"}

    def write(self, folder: Path, job: ExportJob) -> Digests:
        """Write the weights, the configuration and the marker.

        Raises:
            ExportError: If a variant stores something else than was declared, or the
                disk is full.
        """
        model = load_model(job.checkpoint, job.auto_class)
        untouched = {
            name: Part(*about)
            for name, about in untouched_parameters(model, job.inventory).items()
        }
        digests: Digests = {}
        state = model.state_dict()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in untouched:
                yield name, state[name]
            for layer in in_order(job.inventory.layers):
                variant = _declared(layer, job)
                if variant.low_rank is None:  # a product may round in another order
                    digests[layer.name] = digest(variant.weight)
                for part, tensor in variant.pack().items():
                    yield f"{layer.name}.{part}", tensor

        files = write_weight_files(
            folder,
            self.declared(job.storages, untouched),
            tensors(),
            metadata=self.metadata(),
            stem=STEM,
            limit=self.shard_bytes,
        )
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
            files={file.name: file_sha256(file) for file in files},
            layers=layers,
        )
        return digests

    def load(self, folder: Path) -> PreTrainedModel:
        """Read the model back, every layer at full size.

        Raises:
            ExportError: If a file is missing, damaged, newer or of another target.
        """
        marker = read_marker(folder, target=self.name, needs=_NEEDS)
        storages = _storages(folder, marker)
        tensors = _read(folder, marker["files"])
        parts = {
            layer: {
                name: _take(tensors, f"{layer.name}.{name}", part, folder)
                for name, part in storage.parts.items()
            }
            for layer, storage in storages.items()
        }
        model = _build(folder, marker, tensors=tensors, layers=list(storages))
        for layer, storage in storages.items():
            weight = Variant.unpack(storage, parts.pop(layer)).weight
            try:
                write_weight(model, layer, weight)
                put_bias(model, layer, bias_of(weight))
            except ModelError as error:
                raise ExportError(
                    f"the weights in {folder} do not fit config.json: {error}"
                ) from error
        return model


def _declared(layer: Layer, job: ExportJob) -> Variant:
    """Give a layer's variant, which has to store what was declared."""
    variant = job.variant(layer)
    if variant.storage != job.storages[layer]:
        raise ExportError(
            f"the variant of {layer.name!r} stores {variant.storage}, but "
            f"{job.storages[layer]} was declared. The method "
            f"{str(job.actions.get(layer, DENSE))!r} breaks its contract."
        )
    return variant


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


def _read(folder: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    """Map all tensors, after checking that each file is what was written."""
    tensors: dict[str, Tensor] = {}
    for name, sha256 in files.items():
        file = folder / Path(name).name
        try:
            found = file_sha256(file)
            if found != sha256:
                raise ExportError(
                    f"{file} is damaged: its {file.stat().st_size} bytes have SHA-256 "
                    f"{found}, expected {sha256}. {_AGAIN}"
                )
            with safe_open(file, framework="pt") as opened:
                keys = opened.keys()
                tensors |= {key: opened.get_tensor(key) for key in keys}
        except OSError as error:
            raise ExportError(
                f"cannot read {file}: {error.strerror}. {_AGAIN}"
            ) from error
        except SafetensorError as error:
            raise ExportError(f"{file} is damaged: {error}. {_AGAIN}") from error
    return tensors


def _take(tensors: dict[str, Tensor], name: str, part: Part, folder: Path) -> Tensor:
    """Take one part out of what was read, as it was declared."""
    tensor = tensors.pop(name, None)
    found = None if tensor is None else Part(dtype_name(tensor), tuple(tensor.shape))
    if tensor is None or found != part:
        raise ExportError(
            f"the weights in {folder} do not fit {MARKER}: {name!r} is {found}, "
            f"expected {part}. Export the model again."
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
                f"the weights in {folder} do not fit config.json: {len(names)} tensors "
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


@hookimpl
def register_exporters() -> list[Exporter]:
    """Register it."""
    return [Packed()]
