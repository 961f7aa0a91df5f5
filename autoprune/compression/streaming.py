"""Makes variants: of single layers, or block by block on what the blocks read."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.heap import give_back_free_memory
from autoprune.compression.making import Making
from autoprune.compression.method import Source
from autoprune.compression.needs import (
    Pairs,
    by_layer,
    gatherings,
    structured_steps,
)
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.errors import PluginError, StoreError
from autoprune.models.blocks import BlockRunner, Hidden
from autoprune.models.gradients import LayerGradients
from autoprune.models.hidden_statistics import gather_hidden
from autoprune.models.inputs import OnInput
from autoprune.models.layers import Inventory
from autoprune.models.statistics import NO_STATISTICS, Gathering, InputStatistics
from autoprune.policy import DENSE, Action, Layer

Pair = tuple[Layer, Action]
"""What a variant is made of: a layer under an action."""

Progress = Callable[[int, int], None]
"""Is told the blocks that are done, and the blocks to do."""


@dataclass(frozen=True, eq=False)
class VariantMaker:
    """Makes variants from given statistics, and stores them under a bank's keys.

    Attributes:
        stitched: The model, whose dense weights are compressed.
        inventory: Its blocks, layers and sites.
        actions: What actions mean.
        store: Where variants are kept.
        key: Names a variant; see ``VariantBank.key``.
        gradients: Of the layers whose methods read them.
    """

    stitched: StitchedModel
    inventory: Inventory
    actions: Actions
    store: VariantStore
    key: Callable[[Layer, Action], str]
    gradients: Mapping[Layer, LayerGradients] = field(default_factory=dict)

    def lacks(self, layer: Layer, action: Action) -> bool:
        """Tell whether a variant is absent."""
        return self.key(layer, action) not in self.store

    def stored_weight(self, layer: Layer, action: Action) -> Tensor | None:
        """Give a variant's weight, or None if it is absent or was damaged."""
        variant = self.store.get(self.key(layer, action))
        return None if variant is None else variant.weight

    def made(self, layer: Layer, action: Action) -> Variant:
        """Give a variant that has just been made.

        Raises:
            StoreError: If the store has not kept it.
        """
        variant = self.store.get(self.key(layer, action))
        if variant is None:
            raise StoreError(
                f"the variant of {layer.name} under {str(action)!r} is gone as soon as "
                f"it is made: {self.store.folder} is too small (cap "
                f"{self.store.cap_bytes} bytes) or is being deleted"
            )
        return variant

    def put(self, layer: Layer, action: Action, weight: Tensor | None = None) -> None:
        """Put a variant on the model: its weight as it was read, or read it now.

        Raises:
            StoreError: If it has to be read and is gone.
        """
        if weight is None:
            weight = self.made(layer, action).weight
        self.stitched.write(layer, action, weight)

    def make_each(
        self, pairs: Pairs, statistics: InputStatistics = NO_STATISTICS
    ) -> None:
        """Make variants layer by layer, all from the same statistics or from none."""
        making = Making(self.actions)
        for layer, actions in by_layer(pairs).items():
            self._make_group(making, (layer,), actions, statistics)

    def make_block(self, pairs: Pairs, sums: dict[str, Gathering]) -> None:
        """Make a block's variants; layers that share input and actions go together.

        Args:
            pairs: Layers of one block with their actions.
            sums: What each input has gathered. It is emptied on the way: a Hessian may
                take more than all weights of a block.
        """
        wanted, making = by_layer(pairs), Making(self.actions)
        size = _weight_bytes(wanted)
        self._start_sites(making, wanted, sums)
        inputs: dict[str | None, dict[tuple[Action, ...], list[Layer]]] = {}
        for layer, wished in wanted.items():
            groups = inputs.setdefault(layer.input, {})
            groups.setdefault(tuple(wished), []).append(layer)
        for name, groups in inputs.items():
            statistics = sums.pop(name).result() if name else NO_STATISTICS
            for actions, layers in groups.items():
                self._make_group(making, tuple(layers), actions, statistics)
                give_back_free_memory(after=size)  # it counts beside what comes next

    def _start_sites(
        self,
        making: Making,
        wanted: Mapping[Layer, list[Action]],
        sums: Mapping[str, Gathering],
    ) -> None:
        """Do the steps that act on whole sites."""
        together = structured_steps(self.actions, self.inventory, wanted)
        for (group, _), steps in together.items():
            names = {layer.input for layer in group.layers if layer.input is not None}
            known = {name: sums[name].result() for name in names}
            making.start(self._dense(group.layers), list(steps), known)

    def _make_group(
        self,
        making: Making,
        layers: tuple[Layer, ...],
        actions: Sequence[Action],
        statistics: InputStatistics,
    ) -> None:
        tails = {action: action.steps for action in actions}
        for action, variants in making.grow(self._dense(layers), tails, statistics):
            for layer in layers:  # none is held while others are made
                self._keep(layer, action, variants.pop(0))

    def _keep(self, layer: Layer, action: Action, variant: Variant) -> None:
        """Store a variant, if it is what was declared."""
        declared = self.actions.storage(layer, action)
        if variant.storage != declared:  # sizes would be wrong
            raise PluginError(
                f"the variant of {layer.name} under {str(action)!r} stores "
                f"{variant.storage}, but its methods declare {declared}"
            )
        about = f"{layer.name}: {action}"
        self.store.put(self.key(layer, action), variant, about=about)

    def _dense(self, layers: Sequence[Layer]) -> list[Source]:
        weights = [self.stitched.dense_weight(layer) for layer in layers]
        return [
            Source(layer, Variant.dense(weight), weight, self.gradients.get(layer))
            for layer, weight in zip(layers, weights, strict=True)
        ]

    @contextmanager
    def on_dense(self) -> Iterator[None]:
        """Make the model dense for a while, then put back what was on it."""
        before = dict(self.stitched.actions)
        self.stitched.restore()
        try:
            yield
        finally:
            for layer, action in self.stitched.changes(before).items():
                weight = self.stored_weight(layer, action) if action.steps else None
                if action.steps and weight is None:
                    continue  # left dense; whoever puts a policy next makes it again
                self.stitched.write(layer, action, weight)


@dataclass(frozen=True, eq=False)
class StreamingPass:
    """One pass over the blocks of a model, on the inputs that a reference leaves.

    What it holds grows with the width of the model, not with its depth: one block's
    sums, the buffers of a method, the weights of one block of the reference.

    Attributes:
        maker: Makes and stores the variants.
        runner: Runs the blocks over the tokens.
        reference: Action of every layer whose compressed model gives the inputs; empty
            for dense inputs.
    """

    maker: VariantMaker
    runner: BlockRunner
    reference: Mapping[Layer, Action]

    def run(self, wanted: Sequence[Pair], progress: Progress | None = None) -> None:
        """Take each block's inputs, make its variants, pass on what it gives.

        Args:
            wanted: Layers with their actions.
            progress: Called before each block, and at the end.

        Raises:
            MethodError: If the numbers do not allow it.
            PluginError: If a method breaks, or gives other than what it declares.
            StoreError: If variants cannot be written, or are not kept.
        """
        wanted = self._make_hidden(wanted)
        last = max((layer.block or 0 for layer, _ in wanted), default=-1)
        self._put_outside()
        give_back_free_memory()  # of what was done before the pass
        hidden: Hidden = self.runner.start()
        for block in range(last + 1):
            if progress:
                progress(block, last + 1)
            here = [pair for pair in wanted if pair[0].block == block]
            hidden = self._pass_block(block, hidden, here)
        if progress:
            progress(last + 1, last + 1)

    def _make_hidden(self, wanted: Sequence[Pair]) -> list[Pair]:
        """Make what needs the hidden states of all blocks; tell what is left."""
        maker = self.maker
        lost = [pair for pair in self._compressed() if maker.lacks(*pair)]
        whole = {p: None for p in [*wanted, *lost] if maker.actions.is_hidden(p[1])}
        if whole:  # on dense inputs, whatever the reference is
            model = maker.stitched.model
            found = gather_hidden(model, maker.inventory, self.runner)
            maker.make_each(whole, found)
        return [pair for pair in wanted if pair not in whole]

    def _put_outside(self) -> None:
        """Put the reference's variants on the embedding, before any block is run."""
        for pair in self._compressed():
            if pair[0].block is None:
                weight = self.maker.stored_weight(*pair)
                if weight is None:  # absent, or damaged
                    self.maker.make_each([pair])
                self.maker.put(*pair, weight)

    def _pass_block(self, block: int, hidden: Hidden, wanted: Sequence[Pair]) -> Hidden:
        """Make the variants of one block, and give what the next one reads."""
        maker = self.maker
        reference = [pair for pair in self._compressed() if pair[0].block == block]
        kept = {pair: maker.stored_weight(*pair) for pair in reference}
        absent = [pair for pair, weight in kept.items() if weight is None]
        leaving = self._make(block, hidden, [*wanted, *absent])
        if not reference:
            return leaving
        del leaving  # of the dense block, and as large as what enters it
        for pair in reference:
            maker.put(*pair, kept.pop(pair))
        leaving = self.runner.run(block, hidden)
        for layer, _ in reference:  # else the weights of all blocks so far would stay
            maker.stitched.write(layer, DENSE, None)
        give_back_free_memory(after=_weight_bytes(layer for layer, _ in reference))
        return leaving

    def _make(self, block: int, hidden: Hidden, pairs: Sequence[Pair]) -> Hidden:
        """Gather what a dense block reads, make variants from it, run the block."""
        maker = self.maker
        sums = gatherings(maker.actions, maker.inventory, pairs)
        leaving = self.runner.collect(block, hidden, _into(sums), inputs=sums)
        maker.make_block(dict.fromkeys(pairs), sums)
        return leaving

    def _compressed(self) -> list[Pair]:
        """List the layers that the reference does not leave dense."""
        return [pair for pair in self.reference.items() if pair[1].steps]


def _weight_bytes(layers: Iterable[Layer]) -> int:
    return sum(la.numel * getattr(torch, la.dtype).itemsize for la in layers)


def _into(sums: Mapping[str, Gathering]) -> OnInput:
    return lambda name, inputs: sums[name].add(inputs)
