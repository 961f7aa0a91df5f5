"""Makes variants from given statistics, and stores them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

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
    structured_steps,
)
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.errors import PluginError, StoreError
from autoprune.models.finding import norm_scale
from autoprune.models.gradients import LayerGradients
from autoprune.models.layers import Inventory
from autoprune.models.statistics import NO_STATISTICS, Gathering, InputStatistics
from autoprune.policy import Action, Layer

Pair = tuple[Layer, Action]
"""What a variant is made of: a layer under an action."""


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
        variant = self._stored(layer, action)
        return None if variant is None else variant.weight

    def made(self, layer: Layer, action: Action) -> Variant:
        """Give a variant that has just been made.

        Raises:
            StoreError: If the store has not kept it.
        """
        variant = self._stored(layer, action)
        if variant is None:
            raise StoreError(
                f"the variant of {layer.name} under {str(action)!r} is gone as soon as "
                f"it is made: {self.store.folder} is too small (cap "
                f"{self.store.cap_bytes} bytes) or is being deleted"
            )
        return variant

    def _stored(self, layer: Layer, action: Action) -> Variant | None:
        dense = partial(self.stitched.dense_weight, layer)
        return self.store.get(self.key(layer, action), dense)

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

    def make_block(
        self, pairs: Pairs, sums: dict[str, Gathering], *, keep: bool = False
    ) -> None:
        """Make a block's variants; layers that share input and actions go together.

        Args:
            pairs: Layers of one block with their actions.
            sums: What each input has gathered. It is emptied on the way: a Hessian may
                take more than all weights of a block.
            keep: Leave the sums: more is made of the block.
        """
        wanted, making = by_layer(pairs), Making(self.actions)
        size = weight_bytes(wanted)
        self._start_sites(making, wanted, sums)
        inputs: dict[str | None, dict[tuple[Action, ...], list[Layer]]] = {}
        for layer, wished in wanted.items():
            groups = inputs.setdefault(layer.input, {})
            groups.setdefault(tuple(wished), []).append(layer)
        for name, groups in inputs.items():
            statistics = NO_STATISTICS
            if name:
                statistics = (sums[name] if keep else sums.pop(name)).result()
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
        dense = self.stitched.dense_weight(layer)
        self.store.put(self.key(layer, action), variant, about=about, dense=dense)

    def _dense(self, layers: Sequence[Layer]) -> list[Source]:
        weights = [self.stitched.dense_weight(layer) for layer in layers]
        return [
            Source(
                layer,
                Variant.dense(weight),
                weight,
                self.gradients.get(layer),
                norm_scale(self.stitched.model, layer),
            )
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


def weight_bytes(layers: Iterable[Layer]) -> int:
    """Give what the dense weights of layers take in memory."""
    return sum(la.numel * getattr(torch, la.dtype).itemsize for la in layers)
