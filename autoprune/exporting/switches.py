"""Settings of model families that give layers a bias which they do not have so far.

What a setting does is not known by name: it is seen by building the model with it. One
such as Llama's ``attention_bias`` gives a bias to several layers of every block.
"""

import logging
from collections.abc import Collection, Iterable
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from autoprune.exporting.shrinking import skeleton
from autoprune.models.layers import Inventory, untouched_parameters
from autoprune.policy import Layer

log = logging.getLogger(__name__)

Biases = dict[str, Tensor]
"""Biases by the names that they have in memory."""


class BiasSwitches:
    """Knows which settings give the layers of one model a bias.

    Args:
        model: The model; its weights are not looked at.
        inventory: Its layers.
    """

    def __init__(self, model: Any, inventory: Inventory) -> None:
        self._model = model
        self._layers = {f"{layer.name}.bias": layer for layer in inventory.layers}
        self._own = everything(model).keys()

    def needed(self, layers: Iterable[Layer]) -> tuple[str, ...]:
        """Name the settings that give these layers biases; some may have none."""
        found = {self._switch(layer) for layer in layers}
        return tuple(sorted(name for name in found if name is not None))

    def refuses(self, layer: Layer) -> str | None:
        """Say why a layer cannot have a bias, or None if it can."""
        if f"{layer.name}.bias" in self._own or self._switch(layer) is not None:
            return None
        return (
            f"{type(self._model).__name__} has no place for a bias of {layer.role}, "
            "and no setting makes one"
        )

    def added(self, switches: Collection[str]) -> Biases:
        """Give the biases that settings add, zeros without memory of their own."""
        names = [name for one in switches for name in self._by_switch[one]]
        return {name: self._zeros(self._layers[name]) for name in names}

    def _switch(self, layer: Layer) -> str | None:
        """Name the setting that gives a layer a bias; None if it has one or cannot."""
        bias = f"{layer.name}.bias"
        if bias in self._own:
            return None
        gives = (name for name, biases in self._by_switch.items() if bias in biases)
        return next(gives, None)

    def _zeros(self, layer: Layer) -> Tensor:
        dtype = getattr(torch, layer.dtype)
        return torch.zeros(1, dtype=dtype).expand(layer.shape[0])

    @cached_property
    def _by_switch(self) -> dict[str, list[str]]:
        """Try every setting that may be one: those that do nothing else are."""
        settings = self._model.config.get_text_config()
        off = [name for name in vars(settings) if "bias" in name]
        found = {}
        for name in off:
            if getattr(settings, name) is not False:
                continue
            try:
                with_it = everything(switched(self._model, [name]))
            except Exception as error:  # a foreign class refuses as it may
                log.info("%s is no switch of a bias: %s", name, error)
                continue
            new = [other for other in with_it if other not in self._own]
            if new and self._own <= with_it.keys() and self._layers.keys() >= set(new):
                found[name] = new
        return found


def switched(model: Any, switches: Collection[str]) -> Any:
    """Build the model with settings switched on, without any weights."""
    config = deepcopy(model.config)
    for name in switches:
        setattr(config.get_text_config(), name, True)
    return skeleton(model, config)


def everything(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """List all tensors that a checkpoint of a model stores: type and shape by name."""
    return untouched_parameters(model, Inventory("", (), ()))
