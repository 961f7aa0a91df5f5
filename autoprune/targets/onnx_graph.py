"""Writes a model's graph as ONNX, and its weights into one file beside it.

The graph is left as it was traced: a runtime optimizes it anyhow when it opens it, and
so each weight is in the file once, as the model has it, and the size is known before.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.errors import ExportError
from autoprune.models.loading import first_line
from autoprune.models.task import output_layer
from autoprune.targets.onnx_inputs import GraphInput, input_of

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
"""Names of the files."""

LOGITS, FEATURES = "logits", "features"
"""Names of what the graph gives."""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

OPSET = 20
"""Version of the operators; ONNX Runtime has it since 1.17."""


class Traced(nn.Module):
    """A model as its graph has it: one input, logits and what the head reads out.

    Args:
        model: The model.
        given: What it reads.
    """

    def __init__(self, model: Any, given: GraphInput) -> None:
        super().__init__()
        self.model = model
        self._given = given
        self._head = [output_layer(model)]  # in a list, so that it has one name only

    def forward(
        self, values: Tensor
    ) -> tuple[Float[Tensor, "... classes"], Float[Tensor, "... width"]]:
        """Run the model, without a cache."""
        read: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read.append(inputs[0])

        handle = self._head[0].register_forward_pre_hook(keep)
        try:
            inputs = {self._given.name: values, **self._given.fixed}
            logits: Tensor = self.model(**inputs).logits
        finally:
            handle.remove()
        return logits, read[-1]


def is_weight(dtype: torch.dtype) -> bool:
    """Tell whether a graph reads tensors of a type; of counters it reads none."""
    return dtype.is_floating_point


def write_graph(model: Any, folder: Path) -> dict[str, int]:
    """Write the graph and the weights of a model in float32.

    Args:
        model: The model.
        folder: Where.

    Returns:
        Where in the file each weight begins, tied ones under every name.

    Raises:
        ExportError: If the model reads neither tokens nor images, cannot be traced, or
            has weights that nothing reads.
    """
    import onnx_ir  # late: it is an extra

    program = _traced(model, input_of(model))
    everything = model.state_dict(keep_vars=True)
    state = {name: one for name, one in everything.items() if is_weight(one.dtype)}
    waiting = {id(tensor): name for name, tensor in state.items()}
    starts: dict[int, int] = {}
    with (folder / WEIGHTS).open("wb") as file:
        for value in program.model.graph.initializers.values():
            name = str(value.name).removeprefix("model.")
            if name in state and waiting.pop(id(state[name]), None):
                starts[id(state[name])] = file.tell()
                value.const_value = _moved(value, state[name], file, folder)
    if waiting:
        raise ExportError(
            f"the graph of {type(model).__name__} does not read {len(waiting)} of its "
            f"weights, first {next(iter(waiting.values()))!r}. Export it as "
            "transformers"
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in the code of transformers it came from
    onnx_ir.save(program.model, folder / GRAPH)
    return {name: starts[id(tensor)] for name, tensor in state.items()}


def _traced(model: Any, given: GraphInput) -> Any:
    """Trace a model on a few tokens or images.

    Raises:
        ExportError: If it cannot be traced.
    """
    sizes = {axis: torch.export.Dim(name) for axis, name in given.open.items()}
    try:
        with _quiet(), torch.no_grad():
            return torch.onnx.export(
                Traced(model, given),
                (given.example,),
                dynamo=True,
                dynamic_shapes=(sizes,),
                input_names=[given.name],
                output_names=[LOGITS, FEATURES],
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # of any type, where a model's code cannot be traced
        raise ExportError(
            f"{type(model).__name__} cannot be written as ONNX: {first_line(error)}. "
            "Export it as transformers"
        ) from error


def _moved(value: Any, tensor: Tensor, file: IO[bytes], folder: Path) -> Any:
    """Write a weight at the end of the file, and give what stands for it."""
    import onnx_ir  # late: it is an extra

    start = file.tell()
    file.write(tensor.detach().contiguous().numpy().data)
    return onnx_ir.ExternalTensor(
        WEIGHTS,
        start,
        file.tell() - start,
        value.const_value.dtype,
        shape=value.const_value.shape,
        name=value.name,
        base_dir=folder,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what tracing says on the way: nothing that a user could change."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
