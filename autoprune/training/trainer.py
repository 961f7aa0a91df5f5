"""Training a compressed model with what is pruned held at zero.

A training that was killed goes on from its last checkpoint and ends with the same
weights, bit by bit, on the CPU with the same number of threads: the order of windows
follows from the seed, and a checkpoint has weights, optimizer, learning rate and random
numbers.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor, nn

from autoprune.errors import ConfigError, ModelError
from autoprune.training.loop import RecoveryLoop
from autoprune.training.losses import RecoveryLoss
from autoprune.training.masks import FrozenMasks
from autoprune.training.moving_masks import MovingMasks
from autoprune.training.penalties import GroupLasso
from autoprune.training.progress import Observer, Progress, validations
from autoprune.training.resuming import claim, digest_of
from autoprune.training.settings import TrainingSettings
from autoprune.training.training_mode import in_training


@dataclass(frozen=True)
class Recovery:
    """What a training did.

    Attributes:
        steps: Of the optimizer, those before a resume too.
        tokens: Trained on.
        stopped: Why it ended: ``budget``, ``target``, ``patience`` or ``diverged``.
        validations: Step and loss in nats a position, that of the start first.
        seconds: Of this process.
    """

    steps: int
    tokens: int
    stopped: str
    validations: tuple[tuple[int, float], ...]
    seconds: float


def train(
    model: nn.Module,
    windows: Int[Tensor, "windows length"],
    folder: Path,
    *,
    loss: RecoveryLoss,
    masks: FrozenMasks | MovingMasks,
    settings: TrainingSettings,
    validation: Int[Tensor, "others length"] | None = None,
    trained: Collection[str] | None = None,
    depends: Mapping[str, str] | None = None,
    before_step: Callable[[int], None] | None = None,
    penalty: GroupLasso | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Recovery:
    """Train a model in place, from its folder's last checkpoint on if there is one.

    The model is float32 meanwhile, whatever it was: a small step is lost in bfloat16.
    It takes 16 bytes a trained weight and 4 a frozen one, beside activations, and a
    checkpoint 12 bytes a trained weight; one is kept, two while the next is written.
    Afterwards the model has the types, modes and flags that it had, and the process its
    random numbers.

    Args:
        model: The model, compressed as it was when the folder's recovery began.
        windows: What to train on.
        folder: Where checkpoints lie; of this recovery only, and of one process at a
            time.
        loss: What is minimised.
        masks: What is pruned, or what is pruned first and how that changes.
        settings: How long and how fast.
        validation: Other windows, whose loss is told and may end the training.
        trained: Names of the parameters to train, the others are frozen; None for all.
        depends: What else the weights at the end depend on, by what it is.
        before_step: Called before each step of the optimizer with the step's number,
            from 0; the gradients are there, as they are clipped. All that it remembers
            from step to step lies in buffers of the model, which checkpoints keep.
        penalty: What pulls whole units to zero after each step.
        progress: Called after every step.

    Raises:
        ConfigError: If the tokens are not enough for one step, or there is a criterion
            to stop at, but nothing to validate on.
        ModelError: If the model lacks a parameter that is to be trained, or the masks
            are another model's.
        RunError: If the folder is another recovery's, or a checkpoint cannot be
            written.
    """
    began, length = time.monotonic(), windows.shape[1]
    _check(model, masks, settings, length, validates=validation is not None)
    observer = Observer(settings, length, progress)
    with in_training(model, trained):
        identity = _identity(model, windows, loss, masks, settings, validation)
        if penalty is not None:
            identity |= penalty.identity
        claim(folder, identity | dict(depends or {}))
        state = RecoveryLoop(
            model,
            windows,
            folder,
            loss=loss,
            masks=masks,
            settings=settings,
            validation=validation,
            observer=observer,
            before_step=before_step,
        ).recover(penalty)
    masks.check()
    found = validations(state)
    reason = settings.stops([value for _, value in found]) or "budget"
    return Recovery(
        steps=state.global_step,
        tokens=state.global_step * settings.batch * settings.accumulation * length,
        stopped="diverged" if observer.diverged else reason,
        validations=tuple(found),
        seconds=time.monotonic() - began,
    )


def _check(
    model: nn.Module,
    masks: FrozenMasks | MovingMasks,
    settings: TrainingSettings,
    length: int,
    *,
    validates: bool,
) -> None:
    """See that all fits together, before anything is touched."""
    settings.steps(length)
    if masks.model is not model:
        raise ModelError(
            "the masks are those of another model than is trained. Make FrozenMasks of "
            "the model itself."
        )
    if not validates and (settings.target, settings.patience) != (None, None):
        raise ConfigError(
            f"a training that stops at target {settings.target} or patience "
            f"{settings.patience} needs windows to validate on, found none"
        )


def _identity(
    model: nn.Module,
    windows: Tensor,
    loss: RecoveryLoss,
    masks: FrozenMasks | MovingMasks,
    settings: TrainingSettings,
    validation: Tensor | None,
) -> dict[str, str]:
    """Name all that the weights at the end depend on."""
    how = asdict(settings)
    del how["checkpoint_every"]
    parameters = list(model.named_parameters())
    trained = "\n".join(name for name, p in parameters if p.requires_grad)
    found = {
        "settings": json.dumps(how),
        "loss": json.dumps([asdict(loss.weights), loss.blocks]),
        "task": loss.task.name,
        "model": digest_of(dict(parameters) | dict(model.named_buffers())),
        "trained parameters": hashlib.sha256(trained.encode()).hexdigest()[:16],
        "masks": digest_of(dict(masks.parameters())),
        "windows": digest_of({"": windows}),
    }
    if isinstance(masks, MovingMasks):
        found |= masks.identity
    if validation is not None:
        found["validation windows"] = digest_of({"": validation})
    if loss.teacher is not None:
        found["dense model"] = digest_of(dict(loss.teacher.named_parameters()))
    return found
