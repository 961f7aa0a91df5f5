"""Reads a model in compressed-tensors with transformers, its weights dense again."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import decompress_module
from loguru import logger
from transformers import PreTrainedModel

from autoprune.errors import ExportError, ModelError
from autoprune.models.loading import first_line, load_strictly


def load_model(folder: Path, *, auto_class: str, dtype: str) -> PreTrainedModel:
    """Load a model as transformers does by default, and decompress it at once.

    By itself it would be decompressed when it first runs. Activations are still rounded
    where its config groups say so.

    Args:
        folder: The export.
        auto_class: The class of transformers that loads it.
        dtype: Type of all that is not quantized.

    Raises:
        ExportError: If a file is missing or damaged, or weights do not fit.
    """
    with _quiet():
        try:
            model: Any = load_strictly(folder, auto_class, dtype=getattr(torch, dtype))
        except ModelError as error:
            raise ExportError(f"cannot load the export {folder}: {error}") from error
        try:
            _decompress(model)
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            raise ExportError(
                f"the weights in {folder} cannot be decompressed: {first_line(error)}. "
                "Copy the folder again, or export the model again"
            ) from error
    model.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def _decompress(model: Any) -> None:
    """Make all weights dense, and forget that they were not, one module at a time."""
    for module in list(model.modules()):
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        rounds = scheme.input_activations is not None
        decompress_module(module, leave_decompressed=rounds)
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.compressor.remove_decompression_hook(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars and log off the screen."""
    logger.disable("compressed_tensors")
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.enable("compressed_tensors")
