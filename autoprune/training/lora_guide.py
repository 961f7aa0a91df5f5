"""How important weights are by their adapters, and which go. Loads PEFT."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.masks import pruned_count, smallest
from autoprune.policy import Layer
from autoprune.training.adapters import AdaptedLayer, Adapters
from autoprune.training.goals import (
    UNITS,
    Goal,
    by_unit,
    prune_towards,
    structures,
)
from autoprune.training.lora import LoraPruneSettings


class PruningGuide:
    """Knows how important weights are, and prunes the least important.

    What it remembers lies in buffers of the adapted layers: ``pruned``, and
    ``importance`` of weights, ``[out, in]``, or of units.
    """

    def __init__(
        self,
        adapters: Adapters,
        goals: Mapping[Layer, Goal],
        settings: LoraPruneSettings,
    ) -> None:
        self._layers, self._goals, self._settings = adapters.layers, goals, settings
        for layer, module in self._layers.items():
            nothing = torch.zeros(layer.shape, device=module.frozen.device)
            module.mask(nothing.bool(), learnt=True)
            module.register_buffer("importance", self._scores(layer, nothing))

    def kept(self) -> dict[Layer, Bool[Tensor, "out in"]]:
        """Tell which weights stay."""
        return {layer: ~_pruned(module) for layer, module in self._layers.items()}

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Take the gradients of a step, and prune if it is time to."""
        decay = self._settings.decay
        for layer, module in self._layers.items():
            now = self._scores(layer, importance(module))
            _known(module).mul_(decay).add_(now, alpha=1 - decay)
        if self._settings.ramp.prunes_at(step):
            share = self._settings.ramp.sparsity(step)
            self._prune_weights(share)
            self._prune_units(share)

    def _scores(self, layer: Layer, each: Tensor) -> Tensor:
        """Give importance as it is remembered: of weights, or the sums of units."""
        if self._goals[layer].pattern != UNITS:
            return each
        assert layer.cut is not None
        # In float64, so that equal units are equal wherever they lie.
        return by_unit(layer.cut, each.double()).sum(1)

    def _prune_weights(self, share: float) -> None:
        for layer, module in self._layers.items():
            goal, pruned = self._goals[layer], _pruned(module)
            if goal.pattern != UNITS:
                scores = _known(module).masked_fill(pruned, -1.0)  # these go first
                pruned.copy_(prune_towards(scores, goal, share))

    def _prune_units(self, share: float) -> None:
        whole = [la for la in self._layers if self._goals[la].pattern == UNITS]
        for parts in structures(whole).values():
            modules = [self._layers[layer] for layer in parts]
            first = parts[0].cut
            assert first is not None
            scores = torch.stack([_known(module) for module in modules]).sum(0)
            gone = by_unit(first, _pruned(modules[0])).all(1)
            scores = scores.masked_fill(gone, -1.0).cpu()
            count = pruned_count(self._goals[parts[0]].pruned, share)
            marked = smallest(scores[None], count)[0]
            for layer, module in zip(parts, modules, strict=True):
                assert layer.cut is not None
                lines = marked.repeat_interleave(layer.cut.unit).to(gone.device)
                is_rows = layer.cut.axis == "rows"
                _pruned(module).copy_(lines[:, None] if is_rows else lines[None])


@torch.no_grad()
def importance(module: AdaptedLayer) -> Float[Tensor, "out in"]:
    """Estimate what the loss would change by without each weight, squared.

    ``(g * (W + scale B A))**2``, with ``g = scale (G_B A + B G_A - G_B G_A)`` from the
    gradients of A and B: what one step of plain gradient descent with rate 1 takes off
    ``scale B A`` (the LoRA-guided criterion of arXiv:2305.18403; there the scale is in
    B). Gradients are as they were clipped.

    It knows the gradient in as many directions as the adapter has ranks. Sums over
    units even that out; for single weights a low rank ranks them badly.
    """
    a, b = module.factors
    weight = module.adapted()
    if a.grad is None or b.grad is None:  # no token has passed the layer
        return torch.zeros_like(weight)
    # G_B A + (B - G_B) G_A: two products instead of three.
    gradient = b.grad @ a + (b - b.grad) @ a.grad
    found = weight.mul_(gradient).mul_(module.scale).square_()
    # Of a training that diverges: counts stay exact until it is told.
    return found.nan_to_num_(nan=torch.inf, posinf=torch.inf)


def _pruned(module: AdaptedLayer) -> Tensor:
    assert module.pruned is not None
    return module.pruned


def _known(module: AdaptedLayer) -> Tensor:
    found: Tensor = module.get_buffer("importance")
    return found
