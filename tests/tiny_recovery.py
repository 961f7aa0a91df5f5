"""A tiny model to recover, and processes that are killed while they do it."""

import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.tasks import CausalLM
from tiny_models import tiny
from torch import Tensor, nn

from autoprune.models.layers import inventory
from autoprune.policy import Layer
from autoprune.training.losses import LossWeights, RecoveryLoss
from autoprune.training.masks import FrozenMasks
from autoprune.training.settings import TrainingSettings

LENGTH = 12
TASK = RecoveryLoss(CausalLM(), None)
EIGHT_STEPS = TrainingSettings(
    tokens=8 * 4 * LENGTH,
    learning_rate=5e-3,
    batch=2,
    accumulation=2,
    weight_decay=0.1,
    checkpoint_every=3,
    validate_every=4,
)


def windows(count: int = 6, seed: int = 0) -> Tensor:
    """Text that can be learnt: every token follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 60, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        ids.append(3 + (5 * ids[-1] + 7) % 57)
    return torch.stack(ids, 1)


def layers_of(model: nn.Module) -> list[Layer]:
    """The matrices of all blocks that are parameters of their own."""
    found = inventory(model, register_architectures()).layers
    return [la for la in found if la.block is not None and "[" not in la.name]


def compressed(kind: str = "llama") -> tuple[nn.Module, FrozenMasks]:
    """A tiny model without half of its weights."""
    model = tiny(kind)
    generator = torch.Generator().manual_seed(1)
    kept = {
        layer: torch.rand(layer.shape, generator=generator) < 0.5
        for layer in inventory(model, register_architectures()).layers
        if layer.block is not None
    }
    return model, FrozenMasks(model, kept)


def distilling(kind: str) -> RecoveryLoss:
    """The task's loss, and the distance from the dense model."""
    weights = LossWeights(divergence=0.5)
    return RecoveryLoss(CausalLM(), None, weights=weights, teacher=tiny(kind))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all numbers of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """See that numbers are the same, bit by bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


_SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = {paths!r}
    import {module} as tests

    def die(progress):
        if progress.step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)

    tests.recover({kind!r}, Path({folder!r}), die)
"""


def killed(test: str, kind: str, step: int, folder: Path) -> int:
    """Give the exit status of a process that is killed after a step.

    It calls ``recover(kind, folder, progress)`` of a test's file.
    """
    file = Path(test)
    code = textwrap.dedent(_SCRIPT).format(
        paths=[str(file.parent), str(Path(__file__).parent)],
        module=file.stem,
        step=step,
        kind=kind,
        folder=str(folder),
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode
