"""LoRAPrune: pruning guided by adapters, while they are trained.

Zhang et al. (arXiv:2305.18403): a weight's importance follows from weights and
gradients of its adapter, so that no gradient of a full weight is kept and no optimizer
has one. Sparsity grows along a ramp; the adapters make up for what goes, and are merged
at the end.

How we differ: the paper prunes channels and heads, here also single weights and N:M;
what is pruned stays so. As masks act on the adapted weight, the backward pass of a
layer makes its full gradient for a moment. The criterion does not look at it.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor, nn

from autoprune.errors import ConfigError, ModelError
from autoprune.policy import Layer, digest
from autoprune.training.goals import Goal, check_goals
from autoprune.training.lora import (
    LoraPruneSettings,
    LoraSettings,
    check_layers,
    check_loss,
    chosen_layers,
)
from autoprune.training.losses import RecoveryLoss
from autoprune.training.masks import FrozenMasks
from autoprune.training.progress import Progress
from autoprune.training.ramps import Ramp
from autoprune.training.settings import TrainingSettings
from autoprune.training.trainer import Recovery, train


@dataclass(frozen=True, eq=False)
class LoraPruning:
    """What pruning by adapters did.

    Attributes:
        recovery: The training.
        masks: Of the layers that it has pruned; of none if it diverged, because then
            the model is as it was.
    """

    recovery: Recovery
    masks: FrozenMasks


def prune_lora(
    model: nn.Module,
    windows: Int[Tensor, "windows length"],
    folder: Path,
    *,
    goals: Mapping[Layer, Goal],
    loss: RecoveryLoss,
    masks: FrozenMasks,
    settings: TrainingSettings,
    pruning: LoraPruneSettings,
    lora: LoraSettings = LoraSettings(),  # noqa: B008 - it is frozen
    fixed: Collection[Layer] = (),
    validation: Int[Tensor, "others length"] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> LoraPruning:
    """Prune layers step by step while adapters on them are trained, then merge these.

    As ``train_lora``, and it takes 5 bytes a weight of these layers more, for what is
    pruned and how important it is; checkpoints have these, too. What is pruned stays
    so, and is ``+0.0`` at the end: as many weights or units as the goals say, earlier
    first on ties.

    Args:
        model: The model; the layers to prune have no pruned weight yet.
        windows: What to train on.
        folder: Where checkpoints lie; of this pruning only.
        goals: How each layer is to be pruned at the end, a whole matrix of its own; for
            ``units`` all layers of their structures.
        loss: What is minimised.
        masks: What is pruned of other layers.
        settings: How long and how fast; without a criterion to stop at.
        pruning: When and how.
        lora: Which of the layers are pruned by their adapters, and how large these are.
        fixed: Layers that stay as they are.
        validation: Other windows, whose loss is told.
        progress: Called after every step.

    Raises:
        ConfigError: If the ramp ends after the training, this may stop early, or as
            ``train_lora`` does.
        ModelError: If a layer cannot be pruned so; names it. Or as ``train_lora`` does.
        RunError: As ``train`` does.
    """
    from autoprune.training.adapters import adapters_on  # loads PEFT
    from autoprune.training.lora_guide import PruningGuide

    chosen = chosen_layers(list(goals), lora, fixed)
    check_layers(model, chosen)
    check_loss(loss)
    _check_course(pruning.ramp, settings, windows.shape[1])
    check_goals({layer: goals[layer] for layer in chosen})
    if busy := [la for la in chosen if (one := masks.of(la)) is not None and one.any()]:
        raise ModelError(
            f"the layer {busy[0].name!r} has pruned weights already ({len(busy)} of "
            f"{len(chosen)} layers have). Leave it out, or recover it by train_lora."
        )
    with adapters_on(
        model,
        chosen,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        seed=settings.seed,
    ) as adapters:
        guide = PruningGuide(adapters, goals, pruning)
        found = train(
            model,
            windows,
            folder,
            loss=loss,
            masks=masks,
            settings=settings,
            validation=validation,
            trained=adapters.trained(model),
            depends=lora.identity() | _identity(goals, pruning),
            before_step=guide.before_step,
            progress=progress,
        )
        kept = {}
        if found.stopped != "diverged":
            adapters.merge()
            kept = guide.kept()
    made = FrozenMasks(model, kept)
    return LoraPruning(found, made)


def _identity(
    goals: Mapping[Layer, Goal], pruning: LoraPruneSettings
) -> dict[str, str]:
    each = {layer.name: asdict(goal) for layer, goal in goals.items()}
    return {"pruning": json.dumps(asdict(pruning)), "goals": digest([each])}


def _check_course(ramp: Ramp, settings: TrainingSettings, length: int) -> None:
    """See that the training goes on until all is pruned."""
    if (settings.target, settings.patience) != (None, None):
        raise ConfigError(
            f"a training that prunes may not stop before its end, found target "
            f"{settings.target} and patience {settings.patience}. Set both to None."
        )
    steps = settings.steps(length)
    if ramp.end >= steps:
        raise ConfigError(
            f"the ramp ends at step {ramp.end}, but the training has {steps} steps, "
            f"counted from 0. Let the ramp end at {steps - 1} or before, or give more "
            "tokens."
        )
