"""The dense model behind a compressed one, put on a part of it for a while."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from autoprune.compression.apply import StitchedModel
from autoprune.errors import ModelError
from autoprune.models.biases import AddedBias
from autoprune.models.weights import parameter_of, view_of_layer
from autoprune.policy import Layer

Read = Callable[[], Tensor]
"""Gives a dense parameter; not to be written to."""


class DenseParameters:
    """What the parameters of a model are while it is dense.

    They are read when they are put on, so that no more of them than one block has need
    to be in memory beside the model.

    Args:
        model: The model, compressed, and perhaps trained later.
        values: Reads each dense parameter, by name.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Read]) -> None:
        self._model = model
        self._values = values

    @classmethod
    def of_copy(cls, model: nn.Module, dense: nn.Module) -> "DenseParameters":
        """Take them from a dense copy of the model, which nobody changes."""
        named = dense.named_parameters(remove_duplicate=False)
        return cls(model, {name: _known(parameter) for name, parameter in named})

    @classmethod
    def of_stitched(cls, stitched: StitchedModel) -> "DenseParameters":
        """Take them from a model that knows its dense weights.

        What is not compressed is referred to as it stands now, without a copy. So it
        stays dense if a parameter is given another tensor later, as block-wise
        reconstruction does, but not if its tensor is written to.
        """
        layers: dict[str, list[Layer]] = {}
        for layer in stitched.layers:
            layers.setdefault(parameter_of(layer.name), []).append(layer)
        values: dict[str, Read] = {}
        named = stitched.model.named_parameters(remove_duplicate=False)
        for name, parameter in named:
            inside = layers.get(name, [])
            compressed = [layer for layer in inside if stitched.actions[layer].steps]
            own = parameter.own if isinstance(parameter, AddedBias) else parameter
            if compressed:
                # Of some experts only; else nothing in it is dense now.
                rest = parameter.detach() if compressed != inside else None
                about = stitched, name, compressed, rest
                values[name] = partial(_put_together, *about)
            elif own is not None:
                values[name] = _known(own)
        return cls(stitched.model, values)

    @contextmanager
    def on(self, names: Iterable[str]) -> Iterator[None]:
        """Put dense parameters on the model, then what was there before.

        Args:
            names: Of the parameters.

        Raises:
            ModelError: If the dense model lacks one, or has it with another shape.
        """
        before: dict[str, nn.Parameter] = {}
        try:
            for name in names:
                before[name] = now = self._model.get_parameter(name)
                self._set(name, self._dense(name, now))
            yield
        finally:
            for name, parameter in before.items():
                self._set(name, parameter)

    def _dense(self, name: str, now: nn.Parameter) -> nn.Parameter | None:
        """Give a dense parameter; None for a bias that only a variant has brought."""
        read = self._values.get(name)
        if read is None and isinstance(now, AddedBias):
            return None
        dense = read() if read else torch.empty(0)
        if dense.shape != now.shape:
            found = f"with shape {tuple(dense.shape)}" if read else "not at all"
            raise ModelError(
                f"parameter {name!r} has shape {tuple(now.shape)}, but the dense model "
                f"has it {found}. Take both models from one checkpoint."
            )
        return nn.Parameter(dense.to(now), requires_grad=False)

    def _set(self, name: str, parameter: nn.Parameter | None) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(path), leaf, parameter)


def _known(parameter: nn.Parameter) -> Read:
    """Read a parameter as it is now, whatever tensor it is given later."""
    tensor = parameter.detach()
    return lambda: tensor


@torch.no_grad()
def _put_together(
    stitched: StitchedModel,
    name: str,
    layers: Sequence[Layer],
    rest: Tensor | None,
) -> Tensor:
    """Give a parameter with the dense weights of some layers that it holds."""
    base = stitched.model.get_parameter(name).detach() if rest is None else rest
    whole = base.clone()
    for layer in layers:
        view = view_of_layer(stitched.model, layer.name, whole)
        assert view is not None
        view.copy_(stitched.dense_weight(layer))
    return whole
