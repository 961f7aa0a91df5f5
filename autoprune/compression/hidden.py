"""What a method is that narrows the hidden state: it acts on the whole model at once.

All layers that read or write the hidden state share one basis, of which a few
directions are kept. While a search runs, the model stays as wide as it was: what is
added to the hidden state is projected on these directions, and what reads it is
unchanged, since a norm of root mean squares sees only the length of a vector. That is,
to rounding, the function of the narrower model that an exporter cuts.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.method import (
    CompressionMethod,
    Parameter,
    Settings,
    Source,
)
from autoprune.compression.preconditions import finite_weight
from autoprune.compression.storage import Storage
from autoprune.compression.structured import KEEP, kept_units, places
from autoprune.compression.variant import Variant
from autoprune.models.hidden import HIDDEN
from autoprune.policy import Layer


class HiddenMethod(CompressionMethod):
    """A method that keeps some directions of the hidden state.

    A subclass finishes ``compress``. It is given any layers of the model, and as their
    common statistics ``HiddenStatistics``. Nothing may come before or after it in an
    action: masks and grids of the basis of a search mean nothing in the one of a file.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({HIDDEN})
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    parameters: ClassVar[tuple[Parameter, ...]] = (KEEP,)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        if layer.hidden is None or layer.hidden.kind != HIDDEN:
            return (
                "the hidden state of this model cannot be rotated: that takes a family "
                "that is described so, with nothing but norms of root mean squares "
                f"and no bias on the way. {places(self)}"
            )
        if previous != Storage.dense(layer):
            return f"{self.name} comes first: it rotates dense layers"
        if kept_units(layer.hidden, settings["keep"]) == layer.hidden.units:
            width = layer.hidden.units * layer.hidden.unit
            return (
                f"keep={settings['keep']} removes none of {width} directions, which "
                f"go {layer.hidden.unit} at a time"
            )
        return None

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return previous.narrowed(layer, kept_directions(layer, settings))


def kept_directions(layer: Layer, settings: Settings) -> int:
    """Count the directions that stay: a whole number of units, at least one."""
    assert layer.hidden is not None, layer.name
    return kept_units(layer.hidden, settings["keep"]) * layer.hidden.unit


def projected(source: Source, basis: Float[Tensor, "hidden kept"]) -> Variant:
    """Give a layer of the model whose hidden state keeps to the span of a basis.

    Args:
        source: The layer, dense.
        basis: Orthonormal columns.

    Raises:
        MethodError: If the weight holds NaN or infinity; names the layer.
    """
    layer, weight = source.layer, finite_weight(source)
    assert layer.hidden is not None, layer.name
    basis = basis.float()
    if layer.hidden.axis == "rows":
        weight = basis @ (basis.T @ weight)
    elif layer.input is None:  # an embedding, whose columns are the hidden state
        weight = (weight @ basis) @ basis.T
    dtype: torch.dtype = getattr(torch, source.variant.storage.dtype)
    storage = source.variant.storage.narrowed(layer, basis.shape[1])
    return Variant(storage, values=weight.to(dtype).contiguous())
