"""What a graph is given: tokens or images, which of their sizes stay open, examples."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoprune.errors import ExportError

TOKENS, IMAGES = "input_ids", "pixel_values"
"""What transformers calls them."""

_LENGTHS = ((2, 3), (1, 7), (3, 12))
"""Batch and length of examples of tokens."""

_SIZES = ((2, 64, 96), (1, 64, 64), (3, 96, 80))
"""Batch, height and width of examples of images."""


@dataclass(frozen=True, eq=False)
class GraphInput:
    """What a graph is given.

    Attributes:
        name: Its name, as the model has it.
        open: The sizes that are not fixed, by dimension.
        example: What the model is traced on.
        checks: What the graph is held against the model on; of other sizes.
        fixed: What else the model is told.
    """

    name: str
    open: dict[int, str]
    example: Tensor
    checks: tuple[Tensor, ...]
    fixed: dict[str, Any]


def input_of(model: Any) -> GraphInput:
    """Find out what a model reads; images of any size, if it has no size of its own.

    Raises:
        ExportError: If that is neither tokens nor images.
    """
    if model.main_input_name == TOKENS:
        words = model.get_input_embeddings().weight.shape[0]
        first, *others = (_tokens(*shape) % words for shape in _LENGTHS)
        sizes = {0: "batch", 1: "length"}
        return GraphInput(TOKENS, sizes, first, tuple(others), {"use_cache": False})
    if model.main_input_name == IMAGES:
        side = getattr(model.config, "image_size", None)
        own = (side, side) if isinstance(side, int) else side
        channels = model.config.num_channels
        first, *others = (_pixels(n, channels, *(own or size)) for n, *size in _SIZES)
        sizes = {0: "batch"} if own else {0: "batch", 2: "height", 3: "width"}
        return GraphInput(IMAGES, sizes, first, tuple(others), {})
    raise ExportError(
        f"the target onnx writes models that read tokens or images, but "
        f"{type(model).__name__} reads {model.main_input_name!r}. Export it as "
        "transformers"
    )


def _tokens(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).view(batch, length) * 7


def _pixels(*shape: int) -> Tensor:
    """Make images of noise, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
