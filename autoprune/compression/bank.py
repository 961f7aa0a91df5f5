"""A bank: the variants made from one set of layer inputs, made once and on demand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

from torch import Tensor

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.gradients import VERSION as GRADIENTS_VERSION
from autoprune.compression.gradients import Needs, measure_gradients
from autoprune.compression.needs import Pairs, gradient_needs
from autoprune.compression.shares import ALL, Share
from autoprune.compression.store import VariantStore
from autoprune.compression.streaming import Progress, StreamingPass
from autoprune.compression.variant import Variant
from autoprune.compression.variant_maker import VariantMaker
from autoprune.errors import PolicyError
from autoprune.models.blocks import BlockRunner
from autoprune.models.gradients import GRADIENTS, TaskLoss
from autoprune.models.layers import Inventory
from autoprune.models.text import TokenWindows
from autoprune.policy import ONE_SHOT, Action, Layer, Policy, digest

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

    @property
    def schedule(self) -> str:
        """The schedule that the variants have gone through."""
        return ONE_SHOT

    def check_schedule(self, policy: Policy) -> None:
        """See that a policy's schedule is the bank's.

        Raises:
            PolicyError: If it is another: its variants would not be these.
        """
        if policy.schedule != self.schedule:
            raise PolicyError(
                f"the policy's schedule is {policy.schedule!r}, but the variants are "
                f"those of {self.schedule!r}. Open the bank that belongs to the policy"
            )

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
        variant = self._stored(layer, action)
        if variant is None:  # absent; a damaged file has been removed by the store
            self.make([(layer, action)])
            variant = self._maker().made(layer, action)
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
        return self.store.memory.get(
            key, lambda: self.get(layer, action).weight, self.stitched.dtype
        )

    def missing(self, wanted: Pairs) -> list[tuple[Layer, Action]]:
        """Tell which variants are not in the store."""
        pairs = dict.fromkeys((la, action) for la, action in wanted if action.steps)
        return [pair for pair in pairs if self.key(*pair) not in self.store]

    def make(
        self,
        wanted: Pairs,
        progress: Progress | None = None,
        share: Share = ALL,
    ) -> int:
        """Make the variants that are missing, in one streaming pass over the blocks.

        Args:
            wanted: Layers with their actions.
            progress: Called with the blocks done and the blocks to do.
            share: The blocks of this process, where others make the rest at the same
                time, into the same store.

        Returns:
            How many variants were made.

        Raises:
            MethodError: If a step refuses a layer, or the numbers do not allow it.
            PluginError: If a method breaks, or gives other than what it declares.
            StoreError: If variants cannot be written.
        """
        if not share.alone:  # others wait for what the reference needs
            wanted = [*wanted, *self.reference.items()]
            wanted = [pair for pair in wanted if share.has(pair[0].block)]
        missing = self.missing(wanted)
        for pair in missing:
            self.actions.storage(*pair)  # refusals speak before anything is computed
        plain = [pair for pair in missing if not self._is_streamed(pair[1])]
        streamed = [pair for pair in missing if self._is_streamed(pair[1])]
        steep = gradient_needs(
            self.actions, self.inventory, [*missing, *self._lost_references(streamed)]
        )
        if not (streamed or steep):
            self._maker().make_each(plain)
            return len(missing)
        self.stitched.claim(self.name)
        with self._maker().on_dense():
            maker = self._maker(steep)
            maker.make_each(plain)
            if streamed:
                self._streaming(maker, share).run(streamed, progress)
        return len(missing)

    def _stored(self, layer: Layer, action: Action) -> Variant | None:
        dense = partial(self.stitched.dense_weight, layer)
        return self.store.get(self.key(layer, action), dense)

    def _maker(self, steep: Needs | None = None) -> VariantMaker:
        """Give what makes variants, with the gradients that it will need."""
        stitched, inventory = self.stitched, self.inventory
        gradients = measure_gradients(
            stitched.model, inventory, self.loss, self.tokens.ids, steep or {}
        )
        return VariantMaker(
            stitched, inventory, self.actions, self.store, self.key, gradients
        )

    def _streaming(self, maker: VariantMaker, share: Share) -> StreamingPass:
        """Give a pass over the blocks, on the inputs that the reference leaves."""
        runner = BlockRunner(
            self.stitched.model, self.inventory, self.tokens.ids, batch=self.batch
        )
        return StreamingPass(maker, runner, self.reference, share)

    def _lost_references(self, streamed: Pairs) -> list[tuple[Layer, Action]]:
        """Name what a pass makes on its way: what the reference has lost."""
        steep = [
            (layer, action)
            for layer, action in self.reference.items()
            if streamed and self.actions.needs(action) & GRADIENTS
        ]
        return [pair for pair in steep if self._stored(*pair) is None]

    def _is_streamed(self, action: Action) -> bool:
        inputs = self.actions.needs(action) - GRADIENTS
        return bool(inputs) or self.actions.is_structured(action)
