"""Accuracy of a classifier; also where its layers really multiply in INT8.

``int8_dynamic`` and ``rtn(bits=8, symmetric=true)`` store rows of 8 bits, and a search
measures the rounding of weights. With ``int8_accuracy`` activations are rounded, too,
and products are those of ``torch._int_mm``: whole numbers added up in 32 bits, as an
INT8 runtime has them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from autoprune.compression.storage import Storage
from autoprune.evaluation.metric import Evidence, Metric
from autoprune.hookspecs import hookimpl
from autoprune.models.blocks import answering
from autoprune.models.kinds import rows_of
from autoprune.models.weights import read_weight
from autoprune.policy import Layer

BATCH = 64
"""Images that pass the model at a time."""

LARGEST = 127
"""Of 8 bits; -128 is left out, so that zero is in the middle."""


class Accuracy(Metric):
    """Fraction of the images of a split whose likeliest class is the right one.

    The model runs once more for it: what is remembered of a trial are losses.
    """

    name = "accuracy"
    direction = "maximize"
    needs_model = True
    tasks = frozenset({"image-classification"})
    help = "fraction of images whose likeliest class is the right one"

    def measure(self, evidence: Evidence) -> float:
        """Classify the images; NaN if the model gives no numbers."""
        task, ids = evidence.task, evidence.ids
        assert task is not None and ids is not None
        head, right = task.head(evidence.model), 0
        with torch.inference_mode():
            for some in ids.split(BATCH):
                batch = task.batch(some, evidence.tokenizer)
                logits = head.logits(task.features(evidence.model, batch))
                if not torch.isfinite(logits).all():
                    return float("nan")
                right += int((logits.argmax(-1) == batch.labels).sum())
        return right / len(ids)


class Int8Accuracy(Accuracy):
    """Accuracy where all that is stored in 8 symmetric bits a row multiplies in INT8.

    Activations are rounded patch by patch, each by its own largest value; other layers
    compute as ever. Equals ``accuracy`` where no layer is stored so.
    """

    name = "int8_accuracy"
    help = "accuracy with products of 8-bit layers in INT8, activations rounded, too"

    def measure(self, evidence: Evidence) -> float:
        """Classify the images; NaN if the model gives no numbers."""
        with in_int8(evidence.model, evidence.storages):
            return super().measure(evidence)


@contextmanager
def in_int8(model: nn.Module, storages: Mapping[Layer, Storage]) -> Iterator[int]:
    """Let layers multiply in INT8 for a while.

    Args:
        model: The model, with the variants on it.
        storages: What each layer stores; those of 8 symmetric bits a row are meant.

    Yields:
        How many layers that are.
    """
    forwards = {}
    for layer, storage in storages.items():
        rows = storage.group is None and not storage.channel_scales
        if storage.bits == 8 and storage.symmetric and rows:
            module = model.get_submodule(layer.name)
            codes, steps = rounded(read_weight(model, layer).float())
            forwards[module] = partial(_forward, module, codes, steps)
    with answering(forwards):
        yield len(forwards)


def rounded(
    rows: Float[Tensor, "rows columns"],
) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, "rows 1"]]:
    """Round every row to whole numbers, with a step that its largest one fits.

    Example:
        >>> codes, steps = rounded(torch.tensor([[-25.4, 10.0, 0.0]]))
        >>> codes.tolist(), round(float(steps), 3)
        ([[-127, 50, 0]], 0.2)
    """
    largest = rows.abs().amax(1, keepdim=True)
    steps = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (rows / steps).round().to(torch.int8), steps


def int8_product(
    rows: Float[Tensor, "tokens in"],
    codes: Int8[Tensor, "out in"],
    steps: Float[Tensor, "out 1"],
) -> Float[Tensor, "tokens out"]:
    """Multiply rounded rows with a weight in INT8."""
    read, own = rounded(rows.float())
    # The product itself is exact: of 127 * 127, int32 holds 133 thousand.
    product: Tensor = torch._int_mm(read, codes.T)
    return product.float() * own * steps.T


def _forward(
    module: nn.Module, codes: Tensor, steps: Tensor, inputs: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Answer in a module's place: its matrix times its rows, and its bias."""
    out: Tensor = int8_product(rows_of(module, inputs), codes, steps).to(inputs.dtype)
    bias = getattr(module, "bias", None)
    if bias is not None:
        out = out + bias
    if isinstance(module, nn.Conv2d):
        height, width = _size(module, inputs)
        patches: Tensor = out.unflatten(0, (len(inputs), -1)).transpose(1, 2)
        return patches.unflatten(2, (height, width))  # type: ignore[no-any-return]
    return out.view(*inputs.shape[:-1], -1)


def _size(module: nn.Conv2d, inputs: Tensor) -> tuple[int, int]:
    """Tell the height and width that a convolution gives."""
    assert not isinstance(module.padding, str)
    height, width = (
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, dilation, padding, stride in zip(
            inputs.shape[2:],
            module.kernel_size,
            module.dilation,
            module.padding,
            module.stride,
            strict=True,
        )
    )
    return height, width


@hookimpl
def register_metrics() -> list[Metric]:
    """Register both."""
    return [Accuracy(), Int8Accuracy()]
