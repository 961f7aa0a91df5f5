"""Arms of ``from_scratch.py`` that cut channels of the ResNet, inside of its blocks."""

from functools import partial

import torch
from small_models import STEPS, Result, Run, course, scenes

from autoprune.training.masks import FrozenMasks
from autoprune.training.penalties import (
    GroupLasso,
    Parts,
    keep_units,
    masks_of_units,
)

HALF = STEPS // 2

CUT = 0.75
"""Share of the channels that is cut where arms cut channels."""

LASSO, SLIMMING = 0.2, 1.3
"""Strengths of the penalties on filters, and on scales of batch norms."""


def channels(scene: str, seed: int, sparsity: float, *, penalty: str) -> Result:
    """Cut channels inside of blocks after half of the steps, with a penalty until then.

    Those with the smallest filters go, by the root of the mean square, or with the
    smallest scales: a count over all. The rest begins the course of the learning rate
    again. ``sparsity`` is of channels.
    """
    run = Run(scenes()[scene], seed)
    filters, scales, whole = _units(run.model)
    scored = scales if penalty == "scales" else filters
    strength = {"none": 0.0, "filters": LASSO, "scales": SLIMMING}[penalty]
    lasso = GroupLasso(run.model, scored, strength)
    run.train(course(HALF), 0, HALF, lasso.held)
    sizes = lasso.sizes(mean=True)
    kept = keep_units(sizes, sparsity)
    half = run.scene.accuracy(run.model)
    masks = FrozenMasks.of_parameters(run.model, masks_of_units(run.model, whole, kept))
    bare = run.scene.accuracy(run.model)
    run.train(course(HALF), 0, HALF, masks.held)
    masks.check()
    result = {"accuracy": run.scene.accuracy(run.model), "seconds": run.seconds}
    return {**result, "half": half, "bare": bare}


def _units(model: torch.nn.Module) -> tuple[dict[str, Parts], ...]:
    """Give the channels inside of each block: filters, scales, and all that goes."""
    filters: dict[str, Parts] = {}
    scales: dict[str, Parts] = {}
    whole: dict[str, Parts] = {}
    for name, _ in model.named_modules():
        if not name.endswith(".layer"):
            continue
        conv, norm = f"{name}.0.convolution.weight", f"{name}.0.normalization"
        filters[name], scales[name] = {conv: 0}, {f"{norm}.weight": 0}
        reader = {f"{name}.1.convolution.weight": 1}
        whole[name] = {conv: 0, f"{norm}.weight": 0, f"{norm}.bias": 0, **reader}
    return filters, scales, whole


CHANNELS = {
    "filter-norms": partial(channels, penalty="none"),
    "group-lasso": partial(channels, penalty="filters"),
    "slimming": partial(channels, penalty="scales"),
}
