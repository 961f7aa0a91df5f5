"""What one block has to learn, and the number type that it learns in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from autoprune.models.blocks import BlockRunner

Stream = Float[Tensor, "windows ..."]
"""Hidden states of all windows between two blocks: ``[windows, length, hidden]`` of
tokens, ``[windows, channels, height, width]`` of images."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """A block with what enters it and what it should give.

    Attributes:
        runner: Runs the block.
        block: Its index.
        entering: What it reads.
        wanted: What it should give.
        training: So many of the first windows train; the others judge.
        batch: Windows that pass at a time.
    """

    runner: BlockRunner
    block: int
    entering: Stream
    wanted: Stream
    training: int
    batch: int

    @torch.no_grad()
    def loss(self) -> float:
        """Give the loss on the windows that judge."""
        judging = slice(self.training, None)
        total = 0.0
        for entering, wanted in zip(
            self.entering[judging].split(self.batch),
            self.wanted[judging].split(self.batch),
            strict=True,
        ):
            given = self.runner.forward(self.block, entering)
            total += float(_loss(given, wanted)) * len(wanted)
        return total / len(self.wanted[judging])

    @torch.enable_grad()
    def backward(self, rows: Int[Tensor, " windows"]) -> None:
        """Send back the gradient of the loss on some windows."""
        entering, dtype = self.entering[rows], self.entering.dtype
        with torch.autocast(
            entering.device.type, dtype, enabled=dtype != torch.float32
        ):
            given = self.runner.forward(self.block, entering)
        _loss(given, self.wanted[rows]).backward()


@torch.no_grad()
def advance(
    runner: BlockRunner, block: int, stream: Stream, training: int, batch: int
) -> Stream:
    """Turn what enters a block into what it gives, as it stands now.

    In place where both have one shape, as blocks of a transformer have. Windows that
    train and those that judge pass apart, as they do in a lesson.
    """
    given = []
    parts = [*stream[:training].split(batch), *stream[training:].split(batch)]
    for part in parts:
        out = runner.forward(block, part)
        if out.shape == part.shape:
            part.copy_(out)
        else:
            given.append(out)
    return torch.cat(given) if given else stream


def _loss(given: Stream, wanted: Stream) -> Float[Tensor, ""]:
    """Give the mean square of the error, over that of what is wanted, per position.

    Position by position, since some have massive activations (Sun et al. 2024,
    arXiv:2402.17762) that would drown all others: between the blocks of SmolLM2-135M
    one position of 512 has up to 98 % of the sum of squares (measured).
    """
    wanted = wanted.float()
    axis = -1 if wanted.dim() == 3 else 1  # of images, the channels of a place
    error = (given.float() - wanted).square().mean(axis)
    size = wanted.square().mean(axis).clamp_min(torch.finfo(torch.float32).tiny)
    return (error / size).mean()


@contextmanager
def in_float32(
    parameters: Sequence[nn.Parameter], as_stored: torch.dtype
) -> Iterator[None]:
    """Give parameters tensors of their own to train, in which small steps count.

    At the end they have the type that they had, rounded to the stored one.
    """
    before = [(one.dtype, one.requires_grad) for one in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.float32, copy=True)
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, (dtype, required) in zip(parameters, before, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(as_stored).to(dtype)
            parameter.requires_grad_(required)
