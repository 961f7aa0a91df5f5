"""Gradients for methods: gathered together for a model, checked when they are read."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor, nn

from autoprune.compression.checks import require_finite
from autoprune.compression.method import Source
from autoprune.errors import MethodError
from autoprune.models.flow import network_of_sizes, synaptic_flows
from autoprune.models.gradients import (
    SUMS,
    LayerGradients,
    TaskLoss,
    hessian_gradients,
    loss_gradients,
)
from autoprune.models.layers import Inventory
from autoprune.policy import Layer

VERSION = 1
"""Raised when gradients are taken in another way; part of the keys that need them."""

Needs = Mapping[Layer, Collection[str]]
"""For each layer names out of ``GRADIENTS``."""


def measure_gradients(
    model: nn.Module,
    inventory: Inventory,
    loss: TaskLoss | None,
    ids: Int[Tensor, "windows length"],
    needs: Needs,
) -> dict[Layer, LayerGradients]:
    """Gather gradients of a model, in as many whole-model passes as they take.

    Args:
        model: The model as it stands; left as it was.
        inventory: Its layers.
        loss: Its loss.
        ids: The windows.
        needs: What is wanted.

    Raises:
        MethodError: If there is no loss to take gradients of.
        ModelError: If the model has no head, or no embedding where one is needed.
    """
    if not needs:
        return {}
    if loss is None:
        kinds = ", ".join(sorted({name for own in needs.values() for name in own}))
        raise MethodError(
            f"{next(iter(needs)).name} needs {kinds}, but this bank has no loss to "
            "take gradients of. Open the bank with one: VariantBank(..., loss=...)"
        )
    found = {layer: LayerGradients(len(ids)) for layer in needs}
    sums = {layer: own for layer, own in needs.items() if SUMS & set(own)}
    if sums:
        found |= loss_gradients(model, loss, ids, sums)
    curved = [layer for layer, own in needs.items() if "hessian_gradient" in own]
    if curved:
        blocks = [layer for layer in inventory.layers if layer.block is not None]
        products = hessian_gradients(model, loss, ids, curved, blocks)
        for layer, product in products.items():
            found[layer] = replace(found[layer], hessian_gradient=product)
    flowing = [layer for layer, own in needs.items() if "synaptic_flow" in own]
    if flowing:
        with network_of_sizes(model):
            flows = synaptic_flows(model, loss, ids, flowing)
        for layer, flow in flows.items():
            found[layer] = replace(found[layer], flow=flow)
    return found


def finite_gradient(source: Source, kind: str) -> Float[Tensor, "out in"]:
    """Give one of a layer's gradients.

    Args:
        source: The layer.
        kind: Name of a field of ``LayerGradients``.

    Raises:
        MethodError: If it is missing, has another shape, holds NaN or infinity, or is
            zero everywhere.
    """
    layer = source.layer
    found: Tensor | None = getattr(source.gradient, kind, None)
    what = f"gradient ({kind})"
    if found is None:
        raise MethodError(f"the {what} of {layer.name} was not gathered")
    if tuple(found.shape) != layer.shape:
        raise MethodError(
            f"the {what} has shape {tuple(found.shape)}, but {layer.name} {layer.shape}"
        )
    require_finite(found, what, layer.name)
    if not found.any():  # all scores would be equal, and the first weights would go
        raise MethodError(
            f"the {what} of {layer.name} is zero for every weight: no scored position "
            "depends on it. Take more windows, or use magnitude here."
        )
    return found


def gradient_norm(source: Source) -> Float[Tensor, "out in"]:
    """Give the root of the mean square of each weight's gradient over the windows.

    Raises:
        MethodError: If it is missing, has another shape or holds NaN or infinity.
    """
    total = finite_gradient(source, "square_sum")
    assert source.gradient is not None
    return (total / max(source.gradient.windows, 1)).sqrt()
