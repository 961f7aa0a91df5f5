"""Calibrate and prune as the papers' scripts do: the rival in benchmarks.

Block by block: one forward pass takes a Hessian for each of the seven layers, each
layer is pruned by itself, a second pass gives the inputs of the next block.
"""

import time
from collections.abc import Callable, Sequence

import torch
from plain import sparsegpt
from torch import Tensor, nn

from autoprune.models.blocks import BlockRunner
from autoprune.models.layers import Inventory, read_weight, write_weight
from autoprune.models.statistics import matmul_precision
from autoprune.policy import Layer

Level = dict[str, float | int]
"""Arguments of ``plain.sparsegpt``: ``sparsity``, or ``keep`` and ``of``."""


def prune(
    model: nn.Module,
    inventory: Inventory,
    ids: Tensor,
    levels: Sequence[Level],
    *,
    propagate: bool,
    on_weight: Callable[[Layer, int, Tensor], None] | None = None,
) -> float:
    """Prune every layer of every block, layer by layer and level by level.

    Args:
        model: Dense; with ``propagate``, pruned afterwards to the only level.
        inventory: Its blocks and layers.
        ids: Calibration windows ``[windows, length]``.
        levels: What to prune to.
        propagate: Give each block the inputs that the pruned blocks before it leave.
        on_weight: Called with each pruned layer, the number of its level, its weight.

    Returns:
        CPU seconds in the solver; the passes are not among them.
    """
    runner = BlockRunner(model, inventory, ids)
    hidden = runner.start()
    solving = 0.0
    for block in range(len(inventory.blocks)):
        layers = [layer for layer in inventory.layers if layer.block == block]
        hessians, after = _hessians(model, runner, layers, block, hidden)
        start = time.process_time()
        for layer in layers:
            for number, level in enumerate(levels):
                dense = read_weight(model, layer)
                pruned = sparsegpt(dense, hessians[layer], **level)
                if on_weight:
                    on_weight(layer, number, pruned)
                if propagate:
                    write_weight(model, layer, pruned.to(dense.dtype))
        solving += time.process_time() - start
        hidden = runner.run(block, hidden) if propagate else after
    return solving


def _hessians(
    model: nn.Module,
    runner: BlockRunner,
    layers: Sequence[Layer],
    block: int,
    hidden: list[Tensor],
) -> tuple[dict[Layer, Tensor], list[Tensor]]:
    """Take a Hessian for each layer, with the products that AutoPrune uses as well."""
    hessians = {layer: torch.zeros(layer.shape[1], layer.shape[1]) for layer in layers}

    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].flatten(0, -2).float()
            exact = inputs[0].dtype == torch.bfloat16
            with matmul_precision("bf16" if exact else "ieee"):
                hessians[layer] += x.T @ x

        return add

    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(hook(layer))
        for layer in layers
    ]
    after = runner.run(block, hidden)
    for handle in handles:
        handle.remove()
    return hessians, after
