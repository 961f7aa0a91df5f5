"""Runs an ONNX graph as if it were a model of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from autoprune.targets.onnx_graph import FEATURES, GRAPH, LOGITS, WEIGHTS


class OnnxModel(nn.Module):
    """A graph in ONNX Runtime, on the CPU, behind a forward as transformers has it.

    What the head reads comes out of the graph as well and passes through a head of
    torch's, where tasks catch it; the logits are the graph's own.

    Args:
        folder: Where graph and weights are.
        config: The model's configuration.
        head: Where in the file of weights the head is: ``offset``, ``shape`` and, where
            it has one, ``bias``, the offset of that.
    """

    def __init__(self, folder: Path, config: Any, head: Mapping[str, Any]) -> None:
        import onnxruntime  # late: it is an extra

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        self._session = onnxruntime.InferenceSession(
            str(folder / GRAPH), options, providers=["CPUExecutionProvider"]
        )
        self.config = config
        rows, columns = head["shape"]
        self.head = nn.Linear(columns, rows, bias="bias" in head, device="meta")
        self.head.weight = _read(folder, head["offset"], (rows, columns))
        if "bias" in head:
            self.head.bias = _read(folder, head["bias"], (rows,))

    def get_output_embeddings(self) -> nn.Linear:
        """Give the head."""
        return self.head

    def forward(self, values: Tensor | None = None, **inputs: Any) -> CausalLMOutput:
        """Run the graph on all of its input, without a cache or a mask.

        Args:
            values: Its one input; or by its name.
            inputs: By name; others than the graph's are not used.
        """
        name = self._session.get_inputs()[0].name
        given = {name: (inputs[name] if values is None else values).cpu().numpy()}
        logits, features = self._session.run([LOGITS, FEATURES], given)
        if self.head._forward_pre_hooks:  # a task catches what it reads
            self.head(torch.from_numpy(features))
        return CausalLMOutput(logits=torch.from_numpy(logits))


def _read(folder: Path, offset: int, shape: tuple[int, ...]) -> nn.Parameter:
    count = int(np.prod(shape))
    data = np.fromfile(folder / WEIGHTS, np.float32, count, offset=offset)
    return nn.Parameter(torch.from_numpy(data).view(shape), requires_grad=False)
