"""How a compressed model gets its quality back, with what is pruned held at zero."""

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from autoprune.compression.method import Parameter, Settings
from autoprune.errors import ConfigError
from autoprune.hookspecs import hookimpl
from autoprune.training.blockwise import BlockwiseReconstruction, BlockwiseSettings
from autoprune.training.dense import DenseParameters
from autoprune.training.recovery import Pupil, RecoveryMethod, Told
from autoprune.training.whole_model import (
    GROUP_LASSO,
    OF_DENSE,
    SEED,
    TOKENS,
    TRAINING,
    WholeModelRecovery,
)


class Finetune(WholeModelRecovery):
    """Train all pruned layers on the task's loss."""

    name = "finetune"
    reference = "Han et al. 2015, arXiv:1506.02626, Sec. 3"


class Distill(WholeModelRecovery):
    """Train all pruned layers to give what the dense model gives.

    By default only its distribution counts, not the text's own words: a short text has
    too few of them.
    """

    name = "distill"
    reference = "Hinton et al. 2015, arXiv:1503.02531; Kurtic et al. 2023, 2310.06927"
    parameters = (*TRAINING, *OF_DENSE, GROUP_LASSO)


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
        TOKENS,
        Parameter("learning_rate", float, 1e-3, "The first.", 0, 1, open_range=True),
        Parameter("batch", int, 2, "Windows at a time.", 1, 65536),
        Parameter("dense_inputs", bool, False, "Blocks read what dense ones leave."),
        SEED,
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


@hookimpl
def register_recoveries() -> list[RecoveryMethod]:
    """Register them."""
    return [Finetune(), Distill(), Blockwise()]
