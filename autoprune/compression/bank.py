"""A bank: the variants made from one set of layer inputs, made once and on demand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.gradients import VERSION as GRADIENTS_VERSION
from autoprune.compression.gradients import measure_gradients
from autoprune.compression.making import Making
from autoprune.compression.method import Source
from autoprune.compression.needs import (
    Pairs,
    by_layer,
    gatherings,
    gradient_needs,
    structured_steps,
)
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.errors import PluginError, StoreError
from autoprune.models.blocks import BlockRunner
from autoprune.models.gradients import GRADIENTS, LayerGradients, TaskLoss
from autoprune.models.hidden_statistics import gather_hidden
from autoprune.models.inputs import OnInput
from autoprune.models.layers import Inventory
from autoprune.models.statistics import NO_STATISTICS, Gathering, InputStatistics
from autoprune.models.text import TokenWindows
from autoprune.policy import Action, Layer, digest

INPUTS_VERSION = 2
"""Raised when a bank takes its inputs in another way; part of every variant's key."""


@dataclass(eq=False)
class VariantBank:
    """Variants of one model, made on the inputs that a reference policy leaves.

    Attributes:
        stitched: The model.
        inventory: Its blocks, layers and sites.
        actions: What actions mean.
        store: Where variants are kept.
        tokens: Windows of split A, which the statistics are taken from.
        revision: Name of the model's content.
        reference: Action of every layer whose compressed model gives the inputs; empty
            for dense inputs.
        batch: Windows that pass a block at a time.
        loss: What gradients are taken of; None if no method needs them.
    """

    stitched: StitchedModel
    inventory: Inventory
    actions: Actions
    store: VariantStore
    tokens: TokenWindows
    revision: str
    reference: Mapping[Layer, Action] = field(default_factory=dict)
    batch: int = 8
    loss: TaskLoss | None = None
    _gradients: Mapping[Layer, LayerGradients] = field(default_factory=dict, init=False)

    @cached_property
    def name(self) -> str:
        """Fingerprint of the inputs that the variants are made on."""
        reference = {
            layer.name: self.actions.identity(action)
            for layer, action in self.reference.items()
            if action.steps
        }
        dtype = str(self.stitched.dtype)  # inputs differ with the type they come from
        inputs = [self.revision, self.tokens.fingerprint, dtype, reference]
        return digest([INPUTS_VERSION, *inputs])

    def key(self, layer: Layer, action: Action) -> str:
        """Name a variant by all that it depends on, and nothing else.

        An action that needs no statistics does not depend on text or reference; one
        that needs gradients depends on the text, but not on the reference.
        """
        needs = self.actions.needs(action)
        inputs = self.name if needs - GRADIENTS else self.revision
        if needs & GRADIENTS:
            about = [self.tokens.fingerprint, str(self.stitched.dtype)]
            task = self.loss.task.name if self.loss else None
            inputs = digest([inputs, GRADIENTS_VERSION, *about, task])
        identity = self.actions.identity(action)
        return digest([inputs, layer.name, list(layer.shape), identity])

    def get(self, layer: Layer, action: Action) -> Variant:
        """Give a variant, making it if it is absent or was damaged; see ``make``."""
        if not action.steps:
            return Variant.dense(self.stitched.dense_weight(layer))
        variant = self.store.get(self.key(layer, action))
        if variant is None:  # absent; a damaged file has been removed by the store
            self.make([(layer, action)])
            variant = self._read(layer, action)
        return variant

    def put(self, wanted: Mapping[Layer, Action]) -> int:
        """Put a policy's variants on the model; tell how many layers were rewritten."""
        self.stitched.claim(self.name)
        changes = self.stitched.changes(wanted)
        self.make(changes.items())
        for layer, action in changes.items():
            weight = self.weight(layer, action) if action.steps else None
            self.stitched.write(layer, action, weight)
        return len(changes)

    def weight(self, layer: Layer, action: Action) -> Tensor:
        """Give a variant's weight, held in memory. Not to be written to."""
        if not action.steps:
            return self.stitched.dense_weight(layer)
        key = self.key(layer, action)
        return self.store.memory.get(key, lambda: self.get(layer, action).weight)

    def missing(self, wanted: Pairs) -> list[tuple[Layer, Action]]:
        """Tell which variants are not in the store."""
        pairs = dict.fromkeys((la, action) for la, action in wanted if action.steps)
        return [pair for pair in pairs if self.key(*pair) not in self.store]

    def make(
        self, wanted: Pairs, progress: Callable[[int, int], None] | None = None
    ) -> int:
        """Make the variants that are missing, in one streaming pass over the blocks.

        Args:
            wanted: Layers with their actions.
            progress: Called with the blocks done and the blocks to do.

        Returns:
            How many variants were made.

        Raises:
            MethodError: If a step refuses a layer, or the numbers do not allow it.
            PluginError: If a method breaks, or gives other than what it declares.
            StoreError: If variants cannot be written.
        """
        missing = self.missing(wanted)
        for pair in missing:
            self.actions.storage(*pair)  # refusals speak before anything is computed
        plain = [pair for pair in missing if not self._is_streamed(pair[1])]
        streamed = [pair for pair in missing if self._is_streamed(pair[1])]
        steep = gradient_needs(
            self.actions, self.inventory, [*missing, *self._lost_references(streamed)]
        )
        if not (streamed or steep):
            self._make_plain(plain)
            return len(missing)
        self.stitched.claim(self.name)
        before = dict(self.stitched.actions)
        self.stitched.restore()
        try:
            self._gradients = measure_gradients(
                self.stitched.model, self.inventory, self.loss, self.tokens.ids, steep
            )
            self._make_plain(plain)
            if streamed:
                self._stream(streamed, progress or (lambda done, total: None))
        finally:
            self._gradients = {}
            self._return_to(before)
        return len(missing)

    def _make_plain(self, pairs: Pairs) -> None:
        """Make variants that need no inputs, layer by layer."""
        making = Making(self.actions)
        for layer, actions in by_layer(pairs).items():
            self._make_group(making, (layer,), actions, NO_STATISTICS)

    def _lost_references(self, streamed: Pairs) -> list[tuple[Layer, Action]]:
        """Name what a pass makes on its way: what the reference has lost."""
        steep = [
            (layer, action)
            for layer, action in self.reference.items()
            if streamed and self.actions.needs(action) & GRADIENTS
        ]
        return [pair for pair in steep if self.store.get(self.key(*pair)) is None]

    def _stream(
        self,
        wanted: Sequence[tuple[Layer, Action]],
        progress: Callable[[int, int], None],
    ) -> None:
        """Take each block's inputs, make its variants, pass on what it gives."""
        runner = BlockRunner(
            self.stitched.model, self.inventory, self.tokens.ids, batch=self.batch
        )
        pairs = [*wanted, *self.missing(self.reference.items())]
        whole = {pair: None for pair in pairs if self.actions.is_hidden(pair[1])}
        if whole:  # on dense inputs, whatever the reference is
            found = gather_hidden(self.stitched.model, self.inventory, runner)
            for layer, actions in by_layer(whole).items():
                self._make_group(Making(self.actions), (layer,), actions, found)
        wanted = [pair for pair in wanted if pair not in whole]
        last = max((layer.block or 0 for layer, _ in wanted), default=-1)
        self._put_outside()
        hidden = runner.start()
        for block in range(last + 1):
            progress(block, last + 1)
            reference = {
                layer: action
                for layer, action in self.reference.items()
                if layer.block == block and action.steps
            }
            kept = {pair: self.store.get(self.key(*pair)) for pair in reference.items()}
            absent = [pair for pair, variant in kept.items() if variant is None]
            here = [pair for pair in wanted if pair[0].block == block] + absent
            sums = gatherings(self.actions, self.inventory, here)
            after = runner.collect(block, hidden, _into(sums), inputs=sums)
            self._make_block(by_layer(dict.fromkeys(here)), sums)
            for (layer, action), variant in kept.items():
                variant = variant or self._read(layer, action)
                self.stitched.write(layer, action, variant.weight)
            hidden = runner.run(block, hidden) if reference else after
        progress(last + 1, last + 1)

    def _put_outside(self) -> None:
        """Put the reference's variants on the embedding, before any block is run."""
        for layer, action in self.reference.items():
            if layer.block is None and action.steps:
                if self.missing([(layer, action)]):
                    making = Making(self.actions)
                    self._make_group(making, (layer,), [action], NO_STATISTICS)
                variant = self._read(layer, action)
                self.stitched.write(layer, action, variant.weight)

    def _make_block(
        self, wanted: Mapping[Layer, list[Action]], sums: Mapping[str, Gathering]
    ) -> None:
        """Make a block's variants; layers that share input and actions go together."""
        making = Making(self.actions)
        together = structured_steps(self.actions, self.inventory, wanted)
        for (group, _), steps in together.items():
            names = {layer.input for layer in group.layers if layer.input is not None}
            known = {name: sums[name].result() for name in names}
            making.start(self._dense(group.layers), list(steps), known)
        groups: dict[tuple[str | None, tuple[Action, ...]], list[Layer]] = {}
        for layer, wished in wanted.items():
            groups.setdefault((layer.input, tuple(wished)), []).append(layer)
        for (name, actions), layers in groups.items():
            statistics = sums[name].result() if name else NO_STATISTICS
            self._make_group(making, tuple(layers), actions, statistics)

    def _is_streamed(self, action: Action) -> bool:
        inputs = self.actions.needs(action) - GRADIENTS
        return bool(inputs) or self.actions.is_structured(action)

    def _dense(self, layers: Sequence[Layer]) -> list[Source]:
        weights = [self.stitched.dense_weight(layer) for layer in layers]
        return [
            Source(layer, Variant.dense(weight), weight, self._gradients.get(layer))
            for layer, weight in zip(layers, weights, strict=True)
        ]

    def _make_group(
        self,
        making: Making,
        layers: tuple[Layer, ...],
        actions: Sequence[Action],
        statistics: InputStatistics,
    ) -> None:
        tails = {action: action.steps for action in actions}
        made = making.grow(self._dense(layers), tails, statistics)
        for action, variants in made.items():
            for layer, variant in zip(layers, variants, strict=True):
                declared = self.actions.storage(layer, action)
                if variant.storage != declared:  # sizes would be wrong
                    raise PluginError(
                        f"the variant of {layer.name} under {str(action)!r} stores "
                        f"{variant.storage}, but its methods declare {declared}"
                    )
                about = f"{layer.name}: {action}"
                self.store.put(self.key(layer, action), variant, about=about)

    def _read(self, layer: Layer, action: Action) -> Variant:
        variant = self.store.get(self.key(layer, action))
        if variant is None:
            raise StoreError(
                f"the variant of {layer.name} under {str(action)!r} is gone as soon as "
                f"it is made: {self.store.folder} is too small (cap "
                f"{self.store.cap_bytes} bytes) or is being deleted"
            )
        return variant

    def _return_to(self, before: Mapping[Layer, Action]) -> None:
        """Put back what was on the model before a streaming pass."""
        for layer, action in self.stitched.changes(before).items():
            variant = self.store.get(self.key(layer, action)) if action.steps else None
            if action.steps and variant is None:
                continue  # left dense; whoever puts a policy next will make it again
            self.stitched.write(layer, action, variant.weight if variant else None)


def _into(sums: Mapping[str, Gathering]) -> OnInput:
    return lambda name, inputs: sums[name].add(inputs)
