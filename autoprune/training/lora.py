"""Recovery by low-rank adapters, merged into the weights so that masks stay.

The merged change of plain LoRA is full: it brings back what was pruned. Here the mask
acts on the adapted weight in every forward pass, and what is merged is what was
trained. Adapters take ``rank * (out + in)`` trained weights of a layer, so that
optimizer and checkpoints are small; activations are as large as ever.
"""

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor, nn

from autoprune.errors import ConfigError, ModelError, unknown_name
from autoprune.models.task import output_layer
from autoprune.models.weights import (
    MATRICES,
    expert_of,
    parameter_of,
    read_weight,
)
from autoprune.policy import Layer
from autoprune.training.losses import RecoveryLoss
from autoprune.training.masks import FrozenMasks
from autoprune.training.progress import Progress
from autoprune.training.ramps import Ramp
from autoprune.training.settings import TrainingSettings
from autoprune.training.trainer import Recovery, train


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Which layers get an adapter, and how large.

    Attributes:
        rank: Columns of B and rows of A, from 1.
        alpha: The change of a weight is ``alpha / rank * B A``; above 0.
        dropout: Share of what an adapter reads that is set to zero in training, from 0
            to below 1. Above 0 it costs a second product with each weight.
        roles: Roles of the layers that get one, ``q_proj``; empty for all.

    Raises:
        ConfigError: If a setting is out of its range; names it.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"the rank of an adapter is from 1 up, found {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(
                f"alpha of an adapter is a number above 0, found {self.alpha}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"dropout of an adapter is from 0 to below 1, found {self.dropout}"
            )

    def identity(self) -> dict[str, str]:
        """Name what a recovery's result depends on, for its folder."""
        return {"adapters": json.dumps(asdict(self))}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPruneSettings:
    """When and how weights are pruned.

    Attributes:
        ramp: Share of the goals at each step of the optimizer, ending at 1 within the
            training.
        decay: How much of the importance known before stays at a step, from 0 to below
            1 (the paper's lambda).

    Raises:
        ConfigError: If a setting is out of its range.
    """

    ramp: Ramp = Ramp(final=1.0)
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(
                f"decay of importance is from 0 to below 1, found {self.decay}"
            )
        if self.ramp.final != 1.0:
            raise ConfigError(
                f"the ramp of shares of a goal ends at 1, found {self.ramp.final}"
            )


def train_lora(
    model: nn.Module,
    windows: Int[Tensor, "windows length"],
    folder: Path,
    *,
    layers: Sequence[Layer],
    loss: RecoveryLoss,
    masks: FrozenMasks,
    settings: TrainingSettings,
    lora: LoraSettings = LoraSettings(),  # noqa: B008 - it is frozen
    fixed: Collection[Layer] = (),
    validation: Int[Tensor, "others length"] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Recovery:
    """Train adapters on some layers of a model, and merge them into its weights.

    As ``train`` does it: with the same budget, loss, validation, checkpoints and
    resume. Beside the model it takes 16 bytes a weight of the adapters, 4 a frozen one,
    and one layer's weight and gradient at a time. All else is frozen.

    Afterwards the model has its own modules, names, types, modes and flags, and
    nothing of PEFT. A training that diverged, or was cut off, changes no weight.

    Args:
        model: The model, compressed as it was when the folder's recovery began.
        windows: What to train on.
        folder: Where checkpoints lie; of this recovery only.
        layers: Those that may get an adapter; each a whole matrix of its own.
        loss: What is minimised.
        masks: What is pruned; it is ``+0.0`` after the merge.
        settings: How long and how fast.
        lora: Which of the layers get an adapter, and how large.
        fixed: Layers that get none: see ``blockwise.fixed_layers``.
        validation: Other windows, whose loss is told and may end the training.
        progress: Called after every step.

    Raises:
        ConfigError: If a role names no layer, no layer is left, the loss has an L1
            term, or as ``train`` does.
        ModelError: If a layer cannot have an adapter; names it. Or as ``train`` does.
        RunError: As ``train`` does.
    """
    from autoprune.training.adapters import adapters_on  # loads PEFT

    chosen = chosen_layers(layers, lora, fixed)
    check_layers(model, chosen)
    check_loss(loss)
    pruned = {layer: masks.of(layer) for layer in chosen}  # of the model's own modules
    with adapters_on(
        model,
        chosen,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        seed=settings.seed,
    ) as adapters:
        for layer, module in adapters.layers.items():
            module.mask(pruned[layer], learnt=False)
        found = train(
            model,
            windows,
            folder,
            loss=loss,
            masks=masks,
            settings=settings,
            validation=validation,
            trained=adapters.trained(model),
            depends=lora.identity(),
            progress=progress,
        )
        if found.stopped != "diverged":
            adapters.merge()
    masks.check()
    return found


def chosen_layers(
    layers: Sequence[Layer], lora: LoraSettings, fixed: Collection[Layer]
) -> list[Layer]:
    """Take the layers that get an adapter, in their order.

    Raises:
        ConfigError: If a role names no layer, or none is left.
    """
    known = {layer.role for layer in layers}
    for role in lora.roles:
        if role not in known:
            raise ConfigError(unknown_name("role of a layer", role, known))
    wanted = [la for la in layers if not lora.roles or la.role in lora.roles]
    if chosen := [layer for layer in wanted if layer not in fixed]:
        return chosen
    raise ConfigError(
        f"no layer is left for an adapter: of {len(layers)} layers {len(wanted)} have "
        f"a role that gets one, and all of these are fixed. Name other roles."
    )


def check_layers(model: nn.Module, layers: Sequence[Layer]) -> None:
    """See that layers can have adapters.

    Raises:
        ModelError: If one cannot; names it and says why.
    """
    head = _head(model)
    uses: dict[nn.Parameter, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[parameter] = uses.get(parameter, 0) + 1
    for layer in layers:
        read_weight(model, layer)
        if expert_of(layer.name):
            reason = "it is a slice of the parameter of many experts"
        elif type(module := model.get_submodule(layer.name)) not in MATRICES:
            reason = f"it is a {type(module).__name__}"
        elif uses[model.get_parameter(parameter_of(layer.name))] > 1:
            reason = "another layer has the same parameter, which a merge would change"
        elif module is head:
            reason = "losses read the weight of the head, without its adapter"
        else:
            continue
        raise ModelError(
            f"the layer {layer.name!r} cannot have an adapter: {reason}. Leave it out, "
            "or train the weights themselves."
        )


def check_loss(loss: RecoveryLoss) -> None:
    """See that a loss is one of adapters.

    Raises:
        ConfigError: If it has an L1 term, which would be that of A and B.
    """
    if loss.weights.l1:
        raise ConfigError(
            f"the loss weight l1 is {loss.weights.l1}, but adapters are trained, and "
            "to make these small makes no weight small. Set it to 0."
        )


def _head(model: nn.Module) -> nn.Module | None:
    try:
        return output_layer(model)
    except ModelError:
        return None
