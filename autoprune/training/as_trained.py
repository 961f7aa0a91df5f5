"""What training has left of a model, for the steps of an action that follow."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from autoprune.compression.apply import StitchedModel
from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.parameters import Settings, keep_of
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import ModelError
from autoprune.models.statistics import InputStatistics
from autoprune.models.weights import is_parameter, parameter_of, read_weight
from autoprune.policy import Action, Layer, Step

TRAINED = Step("trained")
"""Stands in an action for all that was done before its weights were trained."""


class OwnModel(StitchedModel):
    """A model whose weights are its own once they are written: they will be trained."""

    def write(self, layer: Layer, action: Action, weight: Tensor | None) -> None:
        """Put a copy of a variant's weight on its layer."""
        super().write(layer, action, weight)
        if is_parameter(self.model, layer):
            parameter = self.model.get_parameter(parameter_of(layer.name))
            parameter.data = parameter.data.clone()


class AsTrained(CompressionMethod):
    """Gives each layer as training has left it, for the steps that follow."""

    name: ClassVar[str] = TRAINED.method
    reference: ClassVar[str] = "none"

    def __init__(self, variants: Mapping[Layer, Variant]) -> None:
        self._variants = variants

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what was stored before the training."""
        return self._variants[layer].storage

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Give what was trained, for every setting."""
        return [[self._variants[one.layer]] * len(settings) for one in sources]


def as_trained(student: nn.Module, layer: Layer, variant: Variant) -> Variant:
    """Give a variant with the weights that the student has, in the layer's type."""
    dtype = getattr(torch, layer.dtype)
    weight = read_weight(student, layer).to(dtype).contiguous().clone()
    if variant.mask is not None:  # no -0.0, whatever a rounding does
        weight = torch.where(variant.mask, weight, torch.zeros((), dtype=dtype))
    return replace(variant, values=weight)


def check_kept(layer: Layer, variant: Variant, course: str) -> None:
    """See that a layer keeps as many weights as it is to store, and where it may.

    Raises:
        ModelError: If not; names layer and course.
    """
    storage, mask = variant.storage, variant.mask
    if mask is None:
        return
    kept, pattern = int(mask.sum()), storage.mask or ""
    fits = kept == storage.kept
    if fits and ":" in pattern and not storage.permuted:
        keep, of = keep_of(pattern)
        fits = bool((mask.reshape(-1, of).sum(1) == keep).all())
    if not fits:
        raise ModelError(
            f"{layer.name} keeps {kept} weights after {course}, but is to store "
            f"{storage.kept} as {pattern}. A recovery may move zeros within that only."
        )
