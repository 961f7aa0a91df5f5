"""Folds an order of channels into the layers that make them.

A layer whose N:M pattern holds in another order of its columns gets them in that order,
and the rows of the layers that make these columns go with them. So the tensor itself
follows the pattern, and nothing has to be permuted while the model runs.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor, nn

from autoprune.compression.permuting import refuse_permuting
from autoprune.errors import ExportError
from autoprune.models.layers import Inventory
from autoprune.models.weights import find_weight
from autoprune.policy import Layer


def fold(
    model: nn.Module, inventory: Inventory, orders: Mapping[Layer, Int[Tensor, " in"]]
) -> None:
    """Put the columns of layers in an order, and the rows of their makers with them.

    Args:
        model: The model; its function stays the same but for the rounding of sums.
        inventory: Its layers.
        orders: Columns of each layer, in the order that they shall have.

    Raises:
        ExportError: If the columns of a layer are made by no rows that can follow.
    """
    for layer, order in orders.items():
        layer = inventory.layer(layer.name)
        check_foldable(layer)
        for one in inventory.group_of(layer).layers:
            _reorder(model, one, order)


def check_foldable(layer: Layer) -> None:
    """Refuse a layer whose columns are made by no rows that can follow.

    Raises:
        ExportError: If they are not.
    """
    if reason := refuse_permuting(layer):
        raise ExportError(
            f"the order of the columns of {layer.name} cannot be folded: {reason}. "
            "Export it as packed, or prune it without permute"
        )


@torch.no_grad()
def _reorder(model: nn.Module, layer: Layer, order: Int[Tensor, " in"]) -> None:
    weight = find_weight(model, layer.name)
    assert weight is not None and layer.cut is not None
    rows = layer.cut.axis == "rows"
    weight.copy_(weight[order] if rows else weight[:, order])
    bias = getattr(model.get_submodule(layer.name), "bias", None)
    if rows and bias is not None:
        bias.copy_(bias[order])
