"""Puts variants on a loaded model, rewriting only what changed."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from autoprune.models.biases import bias_of, put_bias
from autoprune.models.computing import compute_in
from autoprune.models.weights import (
    is_parameter,
    parameter_of,
    read_weight,
    write_weight,
)
from autoprune.policy import DENSE, Action, Layer


class StitchedModel:
    """A model that stays loaded while its layers change variants.

    The dense weights are kept from the moment they are first replaced, so ``dense``
    restores the model bit for bit.

    Args:
        model: A loaded model, dense. Its weights are written to from now on.
        layers: The layers that may change.
        compute_dtype: Type to compute in; None for the type that is stored.

    Attributes:
        model: The model, as it stands now.
        actions: What is on each layer now.
        bank: Name of the bank whose variants these are; None before there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[Layer, ...],
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.actions: dict[Layer, Action] = dict.fromkeys(layers, DENSE)
        self.bank: str | None = None
        self._dense: dict[Layer, Tensor] = {}
        # Weights whose stored type the computation does not hold are kept as stored.
        if compute_dtype is not None:
            for layer in layers:
                stored = getattr(torch, layer.dtype)
                if torch.promote_types(stored, compute_dtype) != compute_dtype:
                    self._dense[layer] = read_weight(model, layer).clone()
            compute_in(model, compute_dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        return next(self.model.parameters()).dtype

    def dense_weight(self, layer: Layer) -> Float[Tensor, "out in"]:
        """Give a layer's dense weight in the stored type, whatever is on it now.

        Not to be written to, and only good until the layer is: it may be the model's.
        """
        weight = self._dense.get(layer)
        if weight is None:
            weight = read_weight(self.model, layer)
        return weight.to(getattr(torch, layer.dtype))

    def changes(self, wanted: Mapping[Layer, Action]) -> dict[Layer, Action]:
        """Tell which layers have to be rewritten; those not named become dense."""
        target = {layer: wanted.get(layer, DENSE) for layer in self.layers}
        return {
            la: action for la, action in target.items() if self.actions[la] != action
        }

    def write(self, layer: Layer, action: Action, weight: Tensor | None) -> None:
        """Put one variant's weight on its layer.

        Args:
            layer: The layer.
            action: The action that the weight belongs to.
            weight: ``[out, in]``, with the bias that it brings; None to restore the
                dense weight and the layer's own bias.
        """
        if layer not in self._dense:
            now = read_weight(self.model, layer)
            self._dense[layer] = now if is_parameter(self.model, layer) else now.clone()
        self._place(layer, self._dense[layer] if weight is None else weight)
        put_bias(self.model, layer, None if weight is None else bias_of(weight))
        self.actions[layer] = action

    def _place(self, layer: Layer, weight: Tensor) -> None:
        """Let a parameter be the weight; copy where it is a part of the parameter.

        Without a copy the dense weight may stay in the file that it is mapped from, and
        takes memory only while it is read.
        """
        if tuple(weight.shape) != layer.shape or not is_parameter(self.model, layer):
            write_weight(self.model, layer, weight)
            return
        parameter = self.model.get_parameter(parameter_of(layer.name))
        parameter.data = weight.detach().to(parameter).contiguous()
        increment_version(parameter)  # as a copy would: whoever remembers it sees this

    def claim(self, bank: str) -> None:
        """Take off the variants of other banks: equal actions differ in weights there.

        Args:
            bank: Name of the bank that is about to write.
        """
        if self.bank != bank:
            self.restore()
            self.bank = bank

    def restore(self) -> None:
        """Make the whole model dense again."""
        for layer in self.changes({}):
            self.write(layer, DENSE, None)
