"""The type that a model computes in, which need not be the one that it is stored in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a model compute in a type from now on.

    Buffers keep the precision that they have, or get that of the type if it is more:
    batch norms mix no types.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(torch.promote_types(buffer.dtype, dtype))


@contextmanager
def computing_in(
    model: nn.Module, dtype: torch.dtype, *, copy: bool = False
) -> Iterator[None]:
    """Let a model compute in a type for a while; its tensors come back as they are.

    Args:
        model: The model.
        dtype: The type.
        copy: True if it may be written to meanwhile.
    """
    tensors = [*model.parameters(), *model.buffers()]
    before = [(one, one.data) for one in tensors if one.is_floating_point()]
    try:
        compute_in(model, dtype)
        for tensor, data in before if copy else ():
            if tensor.data_ptr() == data.data_ptr():
                tensor.data = data.clone()
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
