"""Recovery block by block: each learns to give what it gave when it was dense.

No pass goes back through more than one block, so what is held does not grow with depth:
one block's graph and its optimizer, and the hidden states of two streams. The dense
stream is what the dense model has between its blocks, and what is to be learnt. The
compressed stream is what the compressed blocks leave, those before already trained, so
that a block also makes up for their errors. Wanda++ (arXiv:2503.04992) refines blocks
so, in turn with its choice of masks; here masks stay.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from autoprune.compression.heap import give_back_free_memory
from autoprune.compression.storage import Storage
from autoprune.compression.streaming import Progress
from autoprune.errors import ConfigError
from autoprune.models.blocks import BlockRunner
from autoprune.models.layers import Inventory
from autoprune.models.weights import parameter_of, read_weight, view_of_layer
from autoprune.policy import Layer
from autoprune.training.dense import DenseParameters
from autoprune.training.lesson import Lesson, advance, in_float32
from autoprune.training.masks import FrozenMasks


@dataclass(frozen=True, slots=True)
class BlockwiseSettings:
    """How a block is trained.

    Attributes:
        learning_rate: Of Adam at the first step; it falls to zero along a cosine.
        epochs: How often each window is seen.
        batch: Windows of a step.
        dense_inputs: True if a block reads what dense blocks before it leave, not what
            compressed ones do.
        seed: Decides the order of the windows, in each block by itself.

    Raises:
        ConfigError: If a value is not in its range.
    """

    learning_rate: float = 1e-3
    epochs: int = 8
    batch: int = 2
    dense_inputs: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            rate = self.learning_rate
            raise ConfigError(f"learning_rate={rate}: expected a number over 0")
        for name in ("epochs", "batch"):
            if (number := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={number}: expected at least 1")


@dataclass(frozen=True, slots=True)
class BlockRecovery:
    """What training did for one block, on windows that it was not trained on.

    Attributes:
        block: Path of the block.
        before: Its loss: the mean square of what it gives less what the dense block
            gives, over the mean square of the latter, as a mean over positions.
        trained: Its loss after training; NaN if that diverged.
    """

    block: str
    before: float
    trained: float

    @property
    def is_kept(self) -> bool:
        """True if training has made the block better; else it is as it was."""
        return self.trained < self.before

    @property
    def after(self) -> float:
        """Loss of the block as it is left."""
        return self.trained if self.is_kept else self.before


def fixed_layers(storages: Mapping[Layer, Storage]) -> list[Layer]:
    """List the layers whose weights cannot be trained by themselves.

    Of quantized, low-rank and narrowed layers something else is stored, which a trained
    weight would no longer be made of.
    """
    return [
        layer
        for layer, one in storages.items()
        if (one.bits, one.low_rank, one.hidden) != (None, None, None)
    ]


@dataclass(frozen=True, eq=False)
class BlockwiseReconstruction:
    """Trains the blocks of a compressed model one by one: weights, norms and biases.

    What is zero in a layer stays ``+0.0``. What was trained is rounded to the type that
    the block's layers are stored in before it is judged, as an export will have it. It
    comes in new tensors: those that the model had before are never written to, because
    the store of variants and a stitched model's dense weights may share them.

    Attributes:
        model: The compressed model, in evaluation mode.
        inventory: Its blocks and layers.
        dense: What its parameters are while it is dense.
        settings: How a block is trained.
        fixed: Layers whose weights stay as they are; see ``fixed_layers``.
        weights_only: Train layers alone, and leave norms and biases as they are.
    """

    model: nn.Module
    inventory: Inventory
    dense: DenseParameters
    settings: BlockwiseSettings = BlockwiseSettings()
    fixed: Collection[Layer] = ()
    weights_only: bool = False

    def run(
        self,
        ids: Int[Tensor, "windows length"],
        *,
        held_out: int,
        first: int = 0,
        progress: Progress | None = None,
    ) -> list[BlockRecovery]:
        """Train the blocks in order.

        A block that was interrupted is as it was before. So a run that was cut off goes
        on with ``first``, to the same weights as if it had not been.

        Args:
            ids: Tokens.
            held_out: So many of the last windows judge; the others train.
            first: Index of the first block to train; those before stay as they are.
            progress: Called before each block, and at the end.

        Returns:
            What was reached, for each block from ``first`` on.

        Raises:
            ConfigError: If no windows are left to train on or to judge by.
            ModelError: If the model cannot be run block by block, or the dense model
                is another one.
        """
        if not 0 < held_out < len(ids):
            raise ConfigError(
                f"held_out={held_out}: expected at least 1 and fewer than the "
                f"{len(ids)} windows"
            )
        blocks = self.inventory.blocks
        batch, training = self.settings.batch, len(ids) - held_out
        runner = BlockRunner(self.model, self.inventory, ids, batch=batch)
        propagated = not self.settings.dense_inputs
        with self.dense.on(self._outside_blocks()):
            wanted = torch.cat(runner.start())
        entering = torch.cat(runner.start()) if propagated else wanted
        reached = []
        for block, path in enumerate(blocks):
            if progress:
                progress(block, len(blocks))
            entering = entering if propagated else wanted.clone()
            with self.dense.on(_names(self.model, path)):
                wanted = advance(runner, block, wanted, training, batch)
            lesson = Lesson(runner, block, entering, wanted, training, batch)
            if block >= first:
                reached.append(self._teach(block, lesson))
            if propagated:
                entering = advance(runner, block, entering, training, batch)
            give_back_free_memory()
        if progress:
            progress(len(blocks), len(blocks))
        return reached

    def _outside_blocks(self) -> list[str]:
        """Name what runs before the blocks: an embedding may be compressed, too."""
        inside = {n for path in self.inventory.blocks for n in _names(self.model, path)}
        return [name for name, _ in self.model.named_parameters() if name not in inside]

    def _teach(self, block: int, lesson: Lesson) -> BlockRecovery:
        """Train one block, and keep the better of before and after."""
        path, before = self.inventory.blocks[block], lesson.loss()
        layers = [layer for layer in self.inventory.layers if layer.block == block]
        free = [layer for layer in layers if layer not in self.fixed]
        fixed = [layer for layer in layers if layer in self.fixed]
        parameters = _trainable(self.model, path, free, fixed)
        if self.weights_only:
            own = {self.model.get_parameter(parameter_of(la.name)) for la in free}
            parameters = [one for one in parameters if one in own]
        if not before or not parameters or _is_left_out(self.model, layers):
            return BlockRecovery(path, before, before)
        as_stored = getattr(torch, layers[0].dtype) if layers else lesson.wanted.dtype
        before_data = [parameter.data for parameter in parameters]
        trained = math.nan
        try:
            with in_float32(parameters, as_stored):
                masks = FrozenMasks.of_zeros(self.model, free)
                hold = partial(_hold, self.model, fixed)
                self._train(parameters, masks, lesson, hold)
            trained = lesson.loss()
        finally:
            if not trained < before:  # no better, diverged or interrupted
                for parameter, data in zip(parameters, before_data, strict=True):
                    parameter.data = data
        return BlockRecovery(path, before, trained)

    def _train(
        self,
        parameters: list[nn.Parameter],
        masks: FrozenMasks,
        lesson: Lesson,
        hold: Callable[[], None],
    ) -> None:
        """Take all steps of one block.

        Args:
            parameters: What is trained.
            masks: What of it stays at zero.
            lesson: What is to be learnt.
            hold: Called before each step, with the gradients there.
        """
        settings = self.settings
        optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
        steps = settings.epochs * math.ceil(lesson.training / settings.batch)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(settings.seed + lesson.block)
        with masks.held(optimizer):
            for _ in range(settings.epochs):
                order = torch.randperm(lesson.training, generator=generator)
                for rows in order.split(settings.batch):
                    lesson.backward(rows)
                    hold()
                    optimizer.step()
                    optimizer.zero_grad()
                    decay.step()


def _names(model: nn.Module, path: str) -> list[str]:
    """Name the parameters of a block."""
    block = model.get_submodule(path)
    return [f"{path}.{n}" for n, _ in block.named_parameters(remove_duplicate=False)]


def _is_left_out(model: nn.Module, layers: Sequence[Layer]) -> bool:
    """Tell a block that an export leaves out: what it still has would be lost."""
    return bool(layers) and not any(read_weight(model, la).any() for la in layers)


def _trainable(
    model: nn.Module, path: str, free: Sequence[Layer], fixed: Sequence[Layer]
) -> list[nn.Parameter]:
    """Give a block's parameters, but for those that only hold fixed layers."""
    still = {parameter_of(layer.name) for layer in fixed}
    still -= {parameter_of(layer.name) for layer in free}
    names = [name for name in _names(model, path) if name not in still]
    found = dict.fromkeys(model.get_parameter(name) for name in names)
    return [parameter for parameter in found if parameter.is_floating_point()]


def _hold(model: nn.Module, fixed: Sequence[Layer]) -> None:
    """Let fixed experts be where one parameter holds them and others."""
    for layer in fixed:
        gradient = model.get_parameter(parameter_of(layer.name)).grad
        view = None if gradient is None else view_of_layer(model, layer.name, gradient)
        if view is not None:
            view.zero_()
