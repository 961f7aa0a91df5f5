"""How far a training is, and how long it will take."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from autoprune.training.settings import TrainingSettings

VALIDATION = "validation"
"""Key of validation losses in the history that a checkpoint keeps."""


@dataclass(frozen=True)
class Progress:
    """A training after one of its steps.

    Attributes:
        step: Steps done, those before a resume too.
        steps: Of the whole training.
        tokens: Trained on until now.
        loss: Mean of the step's batches: what is minimised.
        terms: Its terms, before their weights.
        validation: The last validation's loss, in nats a position; None before one.
        learning_rate: Of the next step.
        seconds: Since this process began to train.
        seconds_left: Until the last step, at the pace of this process, with
            checkpoints and validations in it.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    terms: dict[str, float]
    validation: float | None
    learning_rate: float
    seconds: float
    seconds_left: float


def validations(state: TrainerState) -> list[tuple[int, float]]:
    """Give all validations until now: the step, and the loss in nats a position."""
    return [
        (int(entry["step"]), entry[VALIDATION])
        for entry in state.log_history
        if VALIDATION in entry
    ]


class Observer(TrainerCallback):
    """Tells progress after each step, and stops a training at its criterion.

    Attributes:
        diverged: True once a loss was not a number.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        length: int,
        tell: Callable[[Progress], None] | None,
    ) -> None:
        self.diverged = False
        self._settings = settings
        self._tokens = settings.batch * settings.accumulation * length
        self._tell = tell
        self._losses: list[dict[str, float]] = []
        self._began: tuple[float, int] | None = None

    def hear(self, losses: dict[str, float]) -> None:
        """Take the losses of one batch: each term, and ``total``."""
        self._losses.append(losses)

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock at the first step of this process."""
        self._began = self._began or (time.monotonic(), state.global_step)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Tell progress; stop where numbers have ended."""
        heard, self._losses = self._losses, []
        means = {k: sum(one[k] for one in heard) / len(heard) for k in heard[0]}
        if not math.isfinite(means["total"]):
            self.diverged = control.should_training_stop = True
        if self._tell:
            assert self._began is not None
            seconds = time.monotonic() - self._began[0]
            pace = seconds / (state.global_step - self._began[1])
            known = validations(state)
            self._tell(
                Progress(
                    step=state.global_step,
                    steps=state.max_steps,
                    tokens=state.global_step * self._tokens,
                    loss=means.pop("total"),
                    terms=means,
                    validation=known[-1][1] if known else None,
                    learning_rate=objects["lr_scheduler"].get_last_lr()[0],
                    seconds=seconds,
                    seconds_left=pace * (state.max_steps - state.global_step),
                )
            )

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop at the criterion, with the weights as they are now on disk."""
        if self._settings.stops([loss for _, loss in validations(state)]):
            control.should_training_stop = control.should_save = True
