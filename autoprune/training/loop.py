"""The loop of a recovery: that of transformers, with what recovery does in its own way.

Loss, masks, checkpoints, validation and the order of windows are ours. Some of the
methods taken over are private ones of transformers; tests of resuming hold them.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from autoprune.errors import RunError
from autoprune.training.losses import RecoveryLoss
from autoprune.training.masks import FrozenMasks
from autoprune.training.moving_masks import MovingMasks
from autoprune.training.penalties import GroupLasso
from autoprune.training.progress import VALIDATION, Observer, validations
from autoprune.training.resuming import (
    keep_only,
    last_checkpoint,
    read_masks,
    read_weights,
    write_masks,
    write_weights,
)
from autoprune.training.settings import SCHEDULES, TrainingSettings

_PART = "part"
"""Folder in which a checkpoint is made before it gets its name."""


class RecoveryLoop(Trainer):
    """The loop of transformers, with our loss, order, checkpoints and validation."""

    loss_is_scaled_for_ga = False  # the mean of a batch: the loop divides it

    def __init__(
        self,
        model: nn.Module,
        windows: Int[Tensor, "windows length"],
        folder: Path,
        *,
        loss: RecoveryLoss,
        masks: FrozenMasks | MovingMasks,
        settings: TrainingSettings,
        validation: Int[Tensor, "others length"] | None,
        observer: Observer,
        before_step: Callable[[int], None] | None = None,
    ) -> None:
        steps = settings.steps(windows.shape[1])
        device = next(model.parameters()).device
        validates = validation is not None
        arguments = _arguments(folder, settings, steps, device, validates=validates)
        arguments.eval_on_start = validates and last_checkpoint(folder) is None
        super().__init__(
            model,
            arguments,
            train_dataset=_Ordered(windows, settings.order(len(windows), steps)),
            eval_dataset=validation,
            callbacks=[observer],
        )
        self.remove_callback(PrinterCallback)
        if before_step:
            self.add_callback(_BeforeStep(before_step))
        self.model_accepts_loss_kwargs = False
        self._model, self._folder, self._validation = model, folder, validation
        self._loss, self._masks, self._settings = loss, masks, settings
        self._observer = observer
        self._measured: dict[int, float] = {}
        self._still = [module for module in model.modules() if _is_still(module)]

    def recover(self, penalty: GroupLasso | None = None) -> TrainerState:
        """Train, unless the last checkpoint is the end; give the state."""
        shutil.rmtree(self._folder / _PART, ignore_errors=True)  # of a killed process
        last = last_checkpoint(self._folder)
        if last is not None:
            self.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
            if self.state.global_step >= self.state.max_steps or self._is_met():
                self._load_from_checkpoint(str(last))
                return self.state
        elif self._validation is not None:
            self.evaluate()
            if self._is_met():
                return self.state
        optimizer = self.create_optimizer()
        pulled = penalty.held(optimizer) if penalty else nullcontext()
        with self._masks.held(optimizer), pulled:
            self.train(resume_from_checkpoint=None if last is None else str(last))
        return self.state

    def _is_met(self) -> bool:
        """Tell whether the criterion to stop at is met."""
        losses = [loss for _, loss in validations(self.state)]
        return self._settings.stops(losses) is not None

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """Give the mean loss of a batch, and tell it."""
        for norm in self._still:  # transformers has just called ``train`` on all
            norm.eval()
        losses = self._loss(self._model, inputs["input_ids"])
        told = {"total": losses.total.detach(), **losses.terms}
        self._observer.hear({name: float(value) for name, value in told.items()})
        return losses.total

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> AbstractContextManager[Any]:
        """Compute in bfloat16 where it does no harm, if the settings want it.

        Ours, because that of accelerate would stay on the model after the training.
        """
        if not self._settings.mixed_precision:
            return nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Give the loss on the validation windows, and keep it in the history."""
        step = self.state.global_step
        if step not in self._measured:
            self._measured[step] = self._validate()
        if step not in dict(validations(self.state)):
            self.log({VALIDATION: self._measured[step]})
        metrics = {f"eval_{VALIDATION}": self._measured[step]}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _validate(self) -> float:
        self._model.eval()
        assert self._validation is not None
        total, count = 0.0, 0
        with self.autocast_smart_context_manager():
            for part in self._validation.split(self._settings.batch):
                each = self._loss.quality(self._model, part.to(self.args.device))
                total, count = total + float(each.double().sum()), count + len(each)
        return total / count

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: transformers would warn of what it cannot count."""
        return 0

    def _get_output_dir(self, trial: Any) -> str:
        """Name where checkpoints are made, before they are whole."""
        return str(self._folder / _PART)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        made = self._folder / f"checkpoint-{self.state.global_step}"
        if made.exists():
            return
        try:
            super()._save_checkpoint(model, trial)
            os.replace(self._folder / _PART / made.name, made)
            os.rmdir(self._folder / _PART)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RunError(
                f"cannot write the checkpoint {made}: {error}. The one before it, if "
                "any, is whole: make room and start again."
            ) from error
        keep_only(made)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        # Not ``save_pretrained``: it may write weights under other names and in other
        # shapes (those of experts), which ``load_state_dict`` would not find.
        write_weights(self._model, Path(output_dir))
        if isinstance(self._masks, MovingMasks):
            write_masks(self._masks, Path(output_dir))

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        if isinstance(self._masks, MovingMasks):
            read_masks(self._masks, Path(folder))
        read_weights(self._model, Path(folder))


class _BeforeStep(TrainerCallback):
    """Calls somebody when gradients are there and weights are not yet changed."""

    def __init__(self, call: Callable[[int], None]) -> None:
        self._call = call

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._call(state.global_step)


def _is_still(module: nn.Module) -> bool:
    """Tell a batch norm that is not trained: its running statistics stay, too."""
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return is_norm and not any(one.requires_grad for one in module.parameters())


class _Ordered(Dataset[dict[str, Tensor]]):
    """Windows in the order in which they are taken."""

    def __init__(self, windows: Tensor, order: Tensor) -> None:
        self._windows, self._order = windows, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[self._order[index]]}


def _arguments(
    folder: Path,
    settings: TrainingSettings,
    steps: int,
    device: torch.device,
    *,
    validates: bool,
) -> TrainingArguments:
    """Tell transformers what to do, and to be quiet."""
    found = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        optim="adamw_torch_fused",
        seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        eval_strategy="steps" if validates else "no",
        eval_steps=settings.validate_every,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if found.n_gpu > 1:  # it would spread batches over all of them
        found._n_gpu = 1
    return found
