"""What recoveries share that train all pruned layers of a model together."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from autoprune.compression.parameters import Parameter, Settings
from autoprune.errors import ConfigError, MethodError
from autoprune.policy import Layer, Value
from autoprune.training.goals import structures
from autoprune.training.losses import LossWeights, RecoveryLoss
from autoprune.training.masks import FrozenMasks
from autoprune.training.moving_masks import MovingMasks
from autoprune.training.penalties import GroupLasso
from autoprune.training.progress import Progress
from autoprune.training.recovery import Pupil, RecoveryMethod, Told
from autoprune.training.settings import SCHEDULES, TrainingSettings
from autoprune.training.trainer import Recovery, train

TOKENS = Parameter(
    "tokens", int, None, "Tokens to train on in all.", 1, 10**15, required=True
)
SEED = Parameter("seed", int, 0, "Of the order of windows.", 0, 2**32 - 1)
TRAINING = (
    TOKENS,
    Parameter("learning_rate", float, 1e-4, "The largest.", 0, 1, open_range=True),
    Parameter("decay", str, "cosine", "Of the rate.", choices=tuple(SCHEDULES)),
    Parameter("warmup", float, 0.05, "Share of the steps in which it rises.", 0, 1),
    Parameter("batch", int, 4, "Windows at a time.", 1, 65536),
    Parameter("accumulation", int, 1, "Batches a step.", 1, 65536),
    Parameter("clip", float, 1.0, "Norm that gradients are clipped to.", 0, 1e6),
    Parameter("mixed_precision", bool, False, "Compute in bfloat16."),
    Parameter("patience", int, None, "Validations without a gain.", 1, 1000),
    SEED,
)
LOSSES = (
    Parameter("task", float, 1.0, "Weight of the task's own loss.", 0, 1e6),
    Parameter("divergence", float, 0.0, "Of the KL to the dense model.", 0, 1e6),
    Parameter("hidden", float, 0.0, "Of SquareHead.", 0, 1e6),
    Parameter("temperature", float, 1.0, "Of the divergence.", 0, 1000),
    Parameter("l1", float, 0.0, "Of the sizes of weights.", 0, 1e6),
)

GROUP_LASSO = Parameter(
    "group_lasso",
    float,
    0.0,
    "Pull of channels, heads and filters to zero before any has gone, as in late.",
    0,
    1e6,
)

OF_DENSE = (
    replace(LOSSES[0], default=0.0),
    replace(LOSSES[1], default=1.0),
    *LOSSES[2:],
)
"""The same where, by default, only the dense model's distribution counts."""

VALIDATIONS = 8
"""How often a training is validated, where it may end for lack of patience."""


class WholeModelRecovery(RecoveryMethod):
    """Trains the weights of all pruned layers together, by losses that are weighed."""

    parameters: ClassVar[tuple[Parameter, ...]] = (*TRAINING, *LOSSES, GROUP_LASSO)
    checkpoint_bytes = 24.0  # weight and two moments, twice while one replaces another

    def check(self, params: Mapping[str, Value]) -> Settings:
        """See that the weights of the losses fit together."""
        settings = super().check(params)
        try:
            _weights(settings)
        except ConfigError as error:
            raise MethodError(f"{self.name}: {error}") from error
        return settings

    def masks(
        self, pupil: Pupil, settings: Settings, steps: int
    ) -> FrozenMasks | MovingMasks:
        """Give what holds the masks: as they are, unless a subclass moves them.

        Args:
            pupil: What is trained.
            settings: Complete parameters.
            steps: Of the optimizer, in this phase.
        """
        return pupil.masks

    def recover(
        self,
        pupil: Pupil,
        settings: Settings,
        *,
        share: float,
        folder: Path,
        told: Told,
    ) -> None:
        """Train the weights of the pupil's layers, with the masks held."""
        asked = settings_of(pupil, settings, share)
        found = train(
            pupil.model,
            pupil.windows,
            folder,
            loss=loss_of(pupil, settings),
            masks=self.masks(pupil, settings, asked.steps(pupil.windows.shape[1])),
            settings=asked,
            validation=pupil.validation if settings["patience"] else None,
            trained=pupil.parameters,
            penalty=_penalty(pupil, settings.get(GROUP_LASSO.name, 0.0)),
            progress=lambda now: told(done(now)),
        )
        check_end(found, asked)


def check_end(found: Recovery, settings: TrainingSettings) -> None:
    """See that a training has not diverged.

    Raises:
        ConfigError: If it has; names the step.
    """
    if found.stopped == "diverged":
        raise ConfigError(
            f"the training diverged: at step {found.steps} the loss was not finite. "
            f"Lower the learning rate, {settings.learning_rate}, or raise warmup."
        )


def _penalty(pupil: Pupil, strength: float) -> GroupLasso | None:
    """Pull at structures that are to lose units, and have lost none yet.

    Raises:
        ConfigError: If the policy removes no units.
    """
    if not strength:
        return None
    if not pupil.cut:
        raise ConfigError(
            f"group_lasso is {strength}, but the policy removes no channels, heads or "
            "filters. Set it to 0, or give such an action: channels(keep=0.5)."
        )
    units = {
        f"{kind} of block {block}": parts
        for (block, kind), parts in structures(pupil.cut).items()
        if not any(_is_pruned(pupil, layer) for layer in parts)
    }
    return GroupLasso(pupil.model, units, strength) if units else None


def _is_pruned(pupil: Pupil, layer: Layer) -> bool:
    mask = pupil.masks.of(layer)
    return mask is not None and bool(mask.any())


def loss_of(pupil: Pupil, settings: Settings) -> RecoveryLoss:
    """Give the loss of some settings; the dense model is the teacher."""
    return RecoveryLoss(
        pupil.task,
        pupil.tokenizer,
        weights=_weights(settings),
        teacher=pupil.dense,
        blocks=pupil.inventory.blocks,
    )


def settings_of(pupil: Pupil, settings: Settings, share: float) -> TrainingSettings:
    """Give the settings of one phase; it is checkpointed ten times."""
    tokens = round(settings["tokens"] * share)
    found = TrainingSettings(
        tokens=tokens,
        learning_rate=settings["learning_rate"],
        schedule=settings["decay"],
        warmup=settings["warmup"],
        batch=settings["batch"],
        accumulation=settings["accumulation"],
        clip=settings["clip"],
        mixed_precision=settings["mixed_precision"],
        patience=settings.get("patience"),
        seed=settings["seed"],
    )
    steps = found.steps(pupil.windows.shape[1])
    return replace(
        found,
        checkpoint_every=max(1, steps // 10),
        validate_every=max(1, steps // VALIDATIONS),
    )


def done(now: Progress) -> float:
    """Tell which share of a training is done."""
    return now.step / now.steps


def _weights(settings: Settings) -> LossWeights:
    names = [one.name for one in LOSSES if one.name in settings]
    return LossWeights(**{name: settings[name] for name in names})
