"""A model made ready to be trained, and put back as it was."""

import random
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import ModelError

_HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def in_training(model: nn.Module, trained: Collection[str] | None) -> Iterator[None]:
    """Let a model be trained for a while: float32, with gradients where wanted.

    Afterwards every tensor has the storage and type that it had, with what was learnt
    written to it; modes, flags and the process's random numbers are as before.

    Args:
        model: The model.
        trained: Names of the parameters that get gradients; None for all.

    Raises:
        ModelError: If there is no such parameter, or none is named.
    """
    chosen = _chosen(model, trained)
    with ExitStack() as undo:
        undo.enter_context(_own_random_numbers())
        config: Any = getattr(model, "config", None)
        if hasattr(config, "use_cache"):
            undo.callback(setattr, config, "use_cache", config.use_cache)
        # A mark that accelerate leaves.
        undo.callback(vars(model).pop, "_is_accelerate_prepared", None)
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.dtype in _HALVES:
                undo.callback(_write_back, tensor, tensor.data)
                tensor.data = tensor.data.float()
        for parameter in model.parameters():
            undo.callback(_put_back, parameter, parameter.requires_grad)
            parameter.requires_grad_(parameter in chosen)
        yield


def _chosen(model: nn.Module, trained: Collection[str] | None) -> set[nn.Parameter]:
    named = dict(model.named_parameters(remove_duplicate=False))
    names = named.keys() if trained is None else trained
    if unknown := [name for name in names if name not in named]:
        raise ModelError(
            f"the model {type(model).__name__} has no parameter {unknown[0]!r} to "
            f"train ({len(unknown)} of {len(names)} names are unknown). Take names "
            "from its named_parameters()."
        )
    if not names:
        raise ModelError(
            "no parameter is named that could be trained; name some, or train all"
        )
    return {named[name] for name in names}


@torch.no_grad()
def _write_back(tensor: Tensor, own: Tensor) -> None:
    """Give a tensor its own storage again, with its values rounded to it."""
    learnt, tensor.data = tensor.data, own
    tensor.copy_(learnt)


def _put_back(parameter: nn.Parameter, required: bool) -> None:
    if parameter.requires_grad:
        # The fused kernel of AdamW does not count its writes, but others go by that
        # count to see that a weight is not what it was.
        torch.autograd.graph.increment_version(parameter)
    parameter.grad = None
    parameter.requires_grad_(required)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Let all generators of the process be what they were, after a while."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
