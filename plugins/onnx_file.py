"""The target ``onnx``: a graph for ONNX Runtime that gives logits of images or tokens.

It has no cache of keys and values, so it is no way to serve a language model: there it
is for runtimes that read nothing else, and for scoring texts.
"""

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from autoprune.compression.permuting import refuse_permuting
from autoprune.compression.storage import Part, Storage
from autoprune.errors import ExportError
from autoprune.exporting.cutting import Cutter
from autoprune.exporting.exporter import Bounds, Digests, Exporter, ExportJob
from autoprune.exporting.folding import fold
from autoprune.exporting.marker import MARKER, read_marker, write_marker
from autoprune.exporting.narrowing import cutter_for
from autoprune.hookspecs import hookimpl
from autoprune.models.biases import put_bias
from autoprune.models.checkpoints import load_model
from autoprune.models.layers import Inventory, write_weight
from autoprune.models.loading import first_line
from autoprune.models.task import output_layer
from autoprune.policy import Layer
from autoprune.targets.onnx_graph import (
    GRAPH,
    PACKAGES,
    WEIGHTS,
    is_weight,
    write_graph,
)
from autoprune.targets.onnx_inputs import IMAGES, TOKENS, input_of
from autoprune.targets.onnx_session import OnnxModel

INPUTS = {
    "AutoModelForCausalLM": TOKENS,
    "AutoModelForImageClassification": IMAGES,
}
"""What the models of the classes that are written read."""

GIVES = {
    TOKENS: "secondary: logits of whole sequences, without a cache or a mask",
    IMAGES: "logits of images of any size that the model takes",
}
"""What a graph gives that reads this."""

AGREEMENT = 1e-3
"""Largest difference of the graph's logits, over the largest logit, in float32.

Measured: 3e-6 on tiny models of six families.
"""

OTHER_CODE = Bounds(
    2e-2, 0.2, "ONNX Runtime computes in float32, and in its own order", in_float32=True
)

_NEEDS = {"files": dict, "head": dict}
_FLOAT = "float32"


class OnnxFile(Exporter):
    """The traced graph, and every weight in float32 in a file beside it.

    ONNX Runtime has few operators for bfloat16 on a CPU, so weights take four bytes
    each. The size is that of ``model.onnx.data``, which holds the weights and nothing
    else; the graph beside it is not counted, as a configuration is not. Whole blocks,
    channels and heads go where all blocks keep equally many, as in the target
    ``transformers``; filters of a convolutional network and channels of its streams go
    wherever they are, as a graph has no widths but its weights'. The model is held in
    memory while it is traced.

    Args:
        cutter: What can be left out of the model, if one is known.
        layers: The model's layers.
        reads: What the model reads.
    """

    name = "onnx"
    stores = (
        "every weight in float32, but no whole blocks, channels, heads or filters "
        "removed"
    )
    loads_in = (
        "ONNX Runtime: logits of images, or of whole sequences without a cache "
        "(secondary)"
    )

    def __init__(
        self,
        cutter: Cutter | None = None,
        layers: tuple[Layer, ...] = (),
        reads: str = TOKENS,
    ) -> None:
        self._cutter = cutter
        self._layers = layers
        self._reads = reads

    def for_model(self, model: Any, inventory: Inventory) -> "OnnxFile":
        """Find out what can be left out of the model."""
        cutter = cutter_for(model, inventory)
        return OnnxFile(cutter, inventory.layers, model.main_input_name)

    def refuses(self, layer: Layer, storage: Storage) -> str | None:
        """Say why a layer so stored cannot be written, or None."""
        if absent := [name for name in PACKAGES if find_spec(name) is None]:
            return f"{absent[0]} is not installed; pip install 'autoprune[onnx]'"
        if storage.permuted and (why := refuse_permuting(layer)):
            return why
        if (
            storage.bias
            and self._cutter
            and (why := self._cutter.switches.refuses(layer))
        ):
            return why
        return super().refuses(layer, storage)

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        """Name what a layer has, in float32."""
        cutter = self._cutter
        shape = cutter.own_shape(layer, storage) if cutter else storage.shape
        parts = {f"{layer.name}.weight": Part(_FLOAT, shape)}
        if storage.bias and cutter:
            switches = cutter.switches
            added = switches.added(switches.needed([layer]))
            parts |= {n: Part(_FLOAT, tuple(t.shape)) for n, t in added.items()}
        return parts

    def metadata(self) -> dict[str, str]:
        """Give none: the file has no header."""
        return {}

    def layer_bytes(self, layer: Layer, storage: Storage) -> int:
        """Price a layer: all actions alike, but for biases and what is gone alone."""
        return sum(part.nbytes for part in self.tensors(layer, storage).values())

    def size_bytes(
        self, storages: Mapping[Layer, Storage], untouched: Mapping[str, Part]
    ) -> int:
        """Tell the size of the file of weights; of parts, the sum of their prices."""
        if self._cutter is None or any(la not in storages for la in self._layers):
            rest = sum(
                Part(_FLOAT, part.shape).nbytes
                for part in untouched.values()
                if is_weight(getattr(torch, part.dtype))
            )
            return rest + sum(self.layer_bytes(la, s) for la, s in storages.items())
        _, state = self._cutter.empty(self._cutter.decide(storages)[0])
        weights = (tensor for tensor in state.values() if is_weight(tensor.dtype))
        return sum(Part(_FLOAT, tuple(one.shape)).nbytes for one in weights)

    def written_bytes(self, folder: Path) -> int:
        """Give the size of the file of weights, without the graph."""
        return (folder / WEIGHTS).stat().st_size

    def bounds(self, storages: Mapping[Layer, Storage]) -> Bounds:
        """Tell how far ONNX Runtime may be from torch."""
        return OTHER_CODE

    def notes(self, storages: Mapping[Layer, Storage]) -> list[str]:
        """Tell what is left out, and what the graph cannot do."""
        told = self._cutter.decide(storages)[1] if self._cutter else []
        gives = GIVES.get(self._reads, "logits")
        known = "weights in float32; the size does not count the graph"
        return [*told, f"{gives}; {known}"]

    def usage(self, folder: str, auto_class: str) -> str:
        """Give the lines that run it in ONNX Runtime."""
        name = INPUTS.get(auto_class, TOKENS)
        return (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{folder}/{GRAPH}")\n'
            f'logits = session.run(["logits"], {{"{name}": {name}}})[0]'
        )

    def write(self, folder: Path, job: ExportJob) -> Digests:
        """Put the policy on the model, trace it, and hold that the graph agrees.

        Returns:
            Nothing: a graph has no layers. The marker has hashes of both files.

        Raises:
            ExportError: If a package is missing, the model cannot be traced, or the
                graph gives other logits.
        """
        for layer, storage in job.storages.items():
            if reason := self.refuses(layer, storage):
                raise ExportError(f"the target onnx cannot hold {layer.name}: {reason}")
        if job.auto_class not in INPUTS:
            raise ExportError(
                "the target onnx writes causal language models and classifiers of "
                f"images, not {job.auto_class}. Export it as transformers"
            )
        model = _compressed(job, self._cutter)
        starts = write_graph(model, folder)
        head = next(n for n, m in model.named_modules() if m is output_layer(model))
        where: dict[str, Any] = {
            "offset": starts[f"{head}.weight"],
            "shape": list(output_layer(model).weight.shape),
        }
        if output_layer(model).bias is not None:
            where["bias"] = starts[f"{head}.bias"]
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        files = {name: _sha256(folder / name) for name in (GRAPH, WEIGHTS)}
        write_marker(folder, target=self.name, files=files, head=where)
        _check_agreement(model, self.load(folder))
        return {}

    def load(self, folder: Path) -> Any:
        """Open the graph in ONNX Runtime.

        Raises:
            ExportError: If a file is missing, damaged or of another target, or a
                package is not installed.
        """
        marker = read_marker(folder, target=self.name, needs=_NEEDS)
        for name, sha256 in marker["files"].items():
            file = folder / Path(name).name
            found = _sha256(file) if file.is_file() else "missing"
            if found != sha256:
                raise ExportError(
                    f"{file} is damaged: its SHA-256 is {found}, expected {sha256}. "
                    "Copy the folder again, or export the model again"
                )
        if find_spec("onnxruntime") is None:
            raise ExportError(
                f"onnxruntime, which runs {folder / GRAPH}, is not installed; pip "
                "install 'autoprune[onnx]'"
            )
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            return OnnxModel(folder, config, marker["head"]).eval()
        except Exception as error:  # a foreign reader on foreign bytes raises anything
            raise ExportError(
                f"cannot open the export {folder}: {first_line(error)}. Check "
                f"config.json and {MARKER}, or export the model again"
            ) from error


def _compressed(job: ExportJob, cutter: Cutter | None) -> Any:
    """Give the model with the policy on it, cut, in float32."""
    model: Any = load_model(job.checkpoint, job.auto_class)
    cutter = cutter or cutter_for(model, job.inventory)
    kept, orders = {}, {}
    for layer in job.inventory.layers:
        variant = job.variant(layer)
        write_weight(model, layer, variant.weight)
        put_bias(model, layer, variant.bias)
        kept[layer] = cutter.kept(layer, variant)
        if variant.order is not None:
            orders[layer] = variant.order
    fold(model, job.inventory, orders)
    small = cutter.cut(model, cutter.decide(job.storages)[0], kept)
    for name, buffer in list(small.named_buffers()):
        if buffer.is_meta:  # no checkpoint stores it, and no cut changes it
            module, _, last = name.rpartition(".")
            setattr(small.get_submodule(module), last, model.get_buffer(name))
    return small.float()


def _check_agreement(model: Any, loaded: Any) -> None:
    """Hold that the graph gives the logits of the model, on inputs of two sizes.

    Raises:
        ExportError: If it does not.
    """
    given = input_of(model)
    for values in given.checks:
        inputs = {given.name: values, **given.fixed}
        with torch.inference_mode():
            expected, found = model(**inputs).logits, loaded(values).logits
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= AGREEMENT:
            raise ExportError(
                f"the ONNX graph of {type(model).__name__} gives other logits than the "
                f"model: they differ by {difference:.1e} of the largest, at most "
                f"{AGREEMENT:.1e} is allowed. Export it as transformers"
            )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@hookimpl
def register_exporters() -> list[Exporter]:
    """Register it."""
    return [OnnxFile()]
