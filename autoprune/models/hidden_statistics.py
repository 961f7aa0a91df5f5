"""What is known of the hidden state: where its norms see it vary, over all blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.blocks import BlockRunner
from autoprune.models.hidden import HiddenState
from autoprune.models.layers import Inventory
from autoprune.models.statistics import InputStatistics


@dataclass(frozen=True, eq=False)
class HiddenStatistics(InputStatistics):
    """Sums over what enters all norms, each vector scaled to length 1.

    ``hessian`` is in float64, the number of ``tokens`` that of vectors. At length 1
    because norms see nothing else: a few tokens are a hundred times longer than others.
    """

    @cached_property
    def axes(self) -> Float[Tensor, "hidden hidden"]:
        """Directions as columns, those along which vectors are longest first.

        The principal components of SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024,
        Sec. 3.3), not centred, in float64.

        Raises:
            ModelError: If the sums hold NaN or infinity.
        """
        assert self.hessian is not None
        if not torch.isfinite(self.hessian).all():
            raise ModelError(
                "hidden states hold NaN or infinity. Check the checkpoint, or compute "
                "in float32"
            )
        ascending: Tensor = torch.linalg.eigh(self.hessian)[1]
        return ascending.flip(1).contiguous()


class HiddenGathering:
    """Adds up the covariance of hidden states, batch by batch.

    Args:
        width: How many directions the hidden state has.
    """

    def __init__(self, width: int) -> None:
        self.vectors = 0
        self.covariance = torch.zeros(width, width, dtype=torch.float64)

    def add(self, hidden: Float[Tensor, "*batch hidden"]) -> None:
        """Add some vectors, in any float type; those of length 0 count for nothing."""
        full = hidden.reshape(-1, hidden.shape[-1]).float()
        full = nn.functional.normalize(full)
        self.vectors += len(full)
        self.covariance += (full.T @ full).double().cpu()

    def result(self) -> HiddenStatistics:
        """Give the sums so far."""
        return HiddenStatistics(self.vectors, hessian=self.covariance.clone())


def gather_hidden(
    model: nn.Module, inventory: Inventory, runner: BlockRunner
) -> HiddenStatistics:
    """Run a model over tokens and add up what enters its norms.

    Args:
        model: The model, dense.
        inventory: Its blocks and its hidden state.
        runner: Runs its blocks over the tokens.
    """
    state = inventory.hidden
    assert state is not None, "a hidden state that cannot be rotated"
    sums = HiddenGathering(state.width)
    hidden = runner.start()
    with _watching(model, state, sums):
        for block in range(len(inventory.blocks)):
            hidden = runner.run(block, hidden)
    for leaving in hidden:  # what the last norm reads
        sums.add(leaving)
    return sums.result()


@contextmanager
def _watching(
    model: nn.Module, state: HiddenState, sums: HiddenGathering
) -> Iterator[None]:
    handles = [
        model.get_submodule(norm).register_forward_pre_hook(partial(_show, sums))
        for norm, _ in state.readers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _show(sums: HiddenGathering, norm: nn.Module, args: Any) -> None:
    sums.add(args[0])
