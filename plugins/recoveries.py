"""How a compressed model gets its quality back, with what is pruned held at zero."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from autoprune.compression.method import Parameter, Settings
from autoprune.errors import ConfigError, MethodError
from autoprune.hookspecs import hookimpl
from autoprune.models.weights import expert_of
from autoprune.policy import Layer, Value
from autoprune.training.blockwise import BlockwiseReconstruction, BlockwiseSettings
from autoprune.training.dense import DenseParameters
from autoprune.training.lora import LoraSettings, train_lora
from autoprune.training.losses import LossWeights, RecoveryLoss
from autoprune.training.progress import Progress
from autoprune.training.recovery import Pupil, RecoveryMethod, Told
from autoprune.training.settings import SCHEDULES, TrainingSettings
from autoprune.training.trainer import train

_TOKENS = Parameter(
    "tokens", int, None, "Tokens to train on in all.", 1, 10**15, required=True
)
_SEED = Parameter("seed", int, 0, "Of the order of windows.", 0, 2**32 - 1)
_TRAINING = (
    _TOKENS,
    Parameter("learning_rate", float, 1e-4, "The largest.", 0, 1, open_range=True),
    Parameter("decay", str, "cosine", "Of the rate.", choices=tuple(SCHEDULES)),
    Parameter("warmup", float, 0.05, "Share of the steps in which it rises.", 0, 1),
    Parameter("batch", int, 4, "Windows at a time.", 1, 65536),
    Parameter("accumulation", int, 1, "Batches a step.", 1, 65536),
    Parameter("clip", float, 1.0, "Norm that gradients are clipped to.", 0, 1e6),
    Parameter("mixed_precision", bool, False, "Compute in bfloat16."),
    Parameter("patience", int, None, "Validations without a gain.", 1, 1000),
    _SEED,
)
_LOSSES = (
    Parameter("task", float, 1.0, "Weight of the task's own loss.", 0, 1e6),
    Parameter("divergence", float, 0.0, "Of the KL to the dense model.", 0, 1e6),
    Parameter("hidden", float, 0.0, "Of SquareHead.", 0, 1e6),
    Parameter("temperature", float, 1.0, "Of the divergence.", 0, 1000),
    Parameter("l1", float, 0.0, "Of the sizes of weights.", 0, 1e6),
)

_OF_DENSE = (
    replace(_LOSSES[0], default=0.0),
    replace(_LOSSES[1], default=1.0),
    *_LOSSES[2:],
)
"""The same where, by default, only the dense model's distribution counts."""

VALIDATIONS = 8
"""How often a training is validated, where it may end for lack of patience."""


class _Trained(RecoveryMethod):
    """Trains the whole model at a time, by losses that are weighed."""

    def check(self, params: Mapping[str, Value]) -> Settings:
        """See that the weights of the losses fit together."""
        settings = super().check(params)
        try:
            _weights(settings)
        except ConfigError as error:
            raise MethodError(f"{self.name}: {error}") from error
        return settings


class Finetune(_Trained):
    """Train all pruned layers on the task's loss."""

    name = "finetune"
    reference = "Han et al. 2015, arXiv:1506.02626, Sec. 3"
    parameters: ClassVar[tuple[Parameter, ...]] = (*_TRAINING, *_LOSSES)

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
        train(
            pupil.model,
            pupil.windows,
            folder,
            loss=_loss(pupil, settings),
            masks=pupil.masks,
            settings=_training(pupil, settings, share),
            validation=pupil.validation if settings["patience"] else None,
            trained=pupil.parameters,
            progress=lambda now: told(_done(now)),
        )


class Distill(Finetune):
    """Train all pruned layers to give what the dense model gives.

    By default only its distribution counts, not the text's own words: a short text has
    too few of them.
    """

    name = "distill"
    reference = "Hinton et al. 2015, arXiv:1503.02531; Kurtic et al. 2023, 2310.06927"
    parameters = (*_TRAINING, *_OF_DENSE)


class Lora(_Trained):
    """Train a product of two small matrices beside each pruned weight, and merge it.

    Experts and heads get none: PEFT has no adapter for them whose change keeps a mask.

    The mask acts on the sum in every forward pass, so what is merged is what was
    trained. By default the dense model's distribution is learnt, as by ``distill``.
    """

    name = "lora"
    reference = "Hu et al. 2021, arXiv:2106.09685, Sec. 4.1"
    parameters = (
        *_TRAINING,
        *_OF_DENSE[:-1],  # l1 would be that of the adapters
        Parameter("rank", int, 16, "Columns of the left factor.", 1, 65536),
        Parameter("alpha", float, 32.0, "Times 1 / rank, the product's.", 0, 1e6),
        Parameter("dropout", float, 0.0, "Of what adapters read.", 0, 0.9),
    )

    def recover(
        self,
        pupil: Pupil,
        settings: Settings,
        *,
        share: float,
        folder: Path,
        told: Told,
    ) -> None:
        """Train adapters of the pupil's layers, and merge them."""
        train_lora(
            pupil.model,
            pupil.windows,
            folder,
            layers=_adapted(pupil),
            loss=_loss(pupil, settings),
            masks=pupil.masks,
            settings=_training(pupil, settings, share),
            lora=LoraSettings(
                rank=settings["rank"],
                alpha=settings["alpha"],
                dropout=settings["dropout"],
            ),
            validation=pupil.validation if settings["patience"] else None,
            progress=lambda now: told(_done(now)),
        )


class Blockwise(RecoveryMethod):
    """Train block by block to give what each gave when it was dense.

    No pass goes back through more than one block. On SmolLM2-135M it takes as long as
    as many tokens of fine-tuning, 331 against 305 CPU seconds, and recovers less
    (``results/schedules``).
    """

    name = "blockwise"
    version = "2"
    reference = "Yang et al. 2025, Wanda++, arXiv:2503.04992, Sec. 4"
    parameters = (
        _TOKENS,
        Parameter("learning_rate", float, 1e-3, "The first.", 0, 1, open_range=True),
        Parameter("batch", int, 2, "Windows at a time.", 1, 65536),
        Parameter("dense_inputs", bool, False, "Blocks read what dense ones leave."),
        _SEED,
    )

    def recover(
        self,
        pupil: Pupil,
        settings: Settings,
        *,
        share: float,
        folder: Path,
        told: Told,
    ) -> None:
        """Train the blocks in order, each as often as the tokens allow."""
        windows = _within(pupil, settings["tokens"] * share)
        asked = BlockwiseSettings(
            learning_rate=settings["learning_rate"],
            epochs=int(settings["tokens"] * share / windows.numel()),
            batch=settings["batch"],
            dense_inputs=settings["dense_inputs"],
            seed=settings["seed"],
        )
        BlockwiseReconstruction(
            pupil.model,
            pupil.inventory,
            DenseParameters.of_copy(pupil.model, pupil.dense),
            asked,
            fixed=[la for la in pupil.inventory.layers if la not in pupil.layers],
            weights_only=True,
        ).run(
            torch.cat([windows, pupil.validation]),
            held_out=len(pupil.validation),
            progress=lambda done, count: told(done / count),
        )


def _within(pupil: Pupil, tokens: float) -> Int[Tensor, "some length"]:
    """Take all windows to train on, or so many of the first as tokens are enough for.

    Raises:
        ConfigError: If they are not enough for one.
    """
    length = pupil.windows.shape[1]
    if tokens < length:
        raise ConfigError(
            f"{tokens:.0f} tokens are not enough for one window of {length}. Give more"
        )
    return pupil.windows[: int(tokens // length)]


def _adapted(pupil: Pupil) -> list[Layer]:
    """List the layers that can have an adapter.

    Raises:
        ConfigError: If there is none.
    """
    found = [la for la in pupil.trainable if la.block is not None]
    found = [layer for layer in found if expert_of(layer.name) is None]
    if not found:
        raise ConfigError(
            f"none of the {len(pupil.layers)} pruned layers can have an adapter: they "
            "are experts, or in no block. Take finetune, distill or blockwise."
        )
    return found


def _weights(settings: Settings) -> LossWeights:
    names = [one.name for one in _LOSSES if one.name in settings]
    return LossWeights(**{name: settings[name] for name in names})


def _loss(pupil: Pupil, settings: Settings) -> RecoveryLoss:
    return RecoveryLoss(
        pupil.task,
        pupil.tokenizer,
        weights=_weights(settings),
        teacher=pupil.dense,
        blocks=pupil.inventory.blocks,
    )


def _training(pupil: Pupil, settings: Settings, share: float) -> TrainingSettings:
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
        patience=settings["patience"],
        seed=settings["seed"],
    )
    steps = found.steps(pupil.windows.shape[1])
    return replace(
        found,
        checkpoint_every=max(1, steps // 10),
        validate_every=max(1, steps // VALIDATIONS),
    )


def _done(now: Progress) -> float:
    return now.step / now.steps


@hookimpl
def register_recoveries() -> list[RecoveryMethod]:
    """Register them."""
    return [Finetune(), Distill(), Lora(), Blockwise()]
