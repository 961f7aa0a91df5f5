"""The head as it stands on a model: known again, and checked against its logits."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.inputs import fitted
from autoprune.models.task import Head, Task, output_layer

HEAD_AGREEMENT = 0.02
"""Largest difference of logits, over the largest logit: rounding to bfloat16."""


_CHECKED = 16
"""Positions of a window whose logits are compared."""


def check_head(
    task: Task, model: nn.Module, ids: Int[Tensor, "windows length"], tokenizer: Any
) -> None:
    """Hold that the head gives the model's own logits, on a few positions."""
    batch = task.batch(task.first_positions(ids, _CHECKED), tokenizer)
    logits = model(**fitted(model, batch.inputs)).logits
    expected = batch.at_scored(logits).float()
    found = task.head(model).logits(task.features(model, batch))
    difference = float((found - expected).abs().max() / expected.abs().max())
    if difference > HEAD_AGREEMENT:
        raise ModelError(
            f"{type(model).__name__} makes its logits in a way that task {task.name!r} "
            f"does not know: those of its output layer differ by {difference:.1%}. "
            "Bring a task of your own with the hook register_tasks"
        )


def stamp_of(model: nn.Module) -> tuple[int, int]:
    """Name the state of the head's weight: writing to it raises its version."""
    weight = output_layer(model).weight
    return id(weight), weight._version


def same_head(one: Head, other: Head) -> bool:
    """Tell whether a head still is the dense model's."""
    return torch.equal(one.weight, other.weight) and (
        one.bias is None or other.bias is None or torch.equal(one.bias, other.bias)
    )
