"""Variants of a model from the inputs of another that it was tuned from.

What was searched for on one model was chosen on that model's norms and Hessians. A
fine-tuned sibling may take them over: then its weights are compressed by the same
statistics, and no text is run through it.

They are gathered again and not read from a file: the sums of a block take more than its
weights, so that a file of all would be larger than the model, and gathering them is one
pass over the original. Its reference's variants are mostly still in the store.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

from autoprune.compression.actions import Actions
from autoprune.compression.bank import VariantBank
from autoprune.compression.mixed import MixedBank
from autoprune.compression.needs import Pairs, gradient_needs
from autoprune.compression.shares import ALL, Share
from autoprune.compression.streaming import Progress
from autoprune.compression.variant_maker import Pair, VariantMaker
from autoprune.errors import MethodError, PolicyError
from autoprune.models.gradients import GRADIENTS
from autoprune.models.layers import Inventory
from autoprune.models.statistics import NO_STATISTICS, Gathering, InputStatistics
from autoprune.policy import Layer, digest

REUSE_VERSION = 1
"""Raised when statistics are carried over in another way; part of every key."""


@dataclass(eq=False, kw_only=True)
class ReusingBank(VariantBank):
    """A bank whose statistics are those of another model's bank.

    Attributes:
        origin: The other model's bank: its text, its reference, its inputs.
    """

    origin: VariantBank

    @classmethod
    def of(cls, own: VariantBank, origin: VariantBank) -> VariantBank:
        """Give a model's bank with the statistics of another's.

        Args:
            own: A bank of the model.
            origin: The other model's bank; where it is mixed, this one will be.
        """
        if isinstance(origin, MixedBank):
            names = {layer.name for layer in origin.taken}
            taken = frozenset(la for la in own.inventory.layers if la.name in names)
            most, other = cls.of(own, origin.own), cls.of(own, origin.other)
            return MixedBank.of(most, other, taken)
        shared = {field.name: getattr(own, field.name) for field in fields(VariantBank)}
        return cls(**shared, origin=origin)

    @cached_property
    def name(self) -> str:
        """Fingerprint of the model and of the other model's inputs."""
        return digest([REUSE_VERSION, self.revision, self.origin.name])

    def make(
        self, wanted: Pairs, progress: Progress | None = None, share: Share = ALL
    ) -> int:
        """Make the variants that are missing, in one pass over the other model.

        Args:
            wanted: Layers with their actions.
            progress: Called with the blocks done and the blocks to do.
            share: Not shared out: the first share is all of it.

        Returns:
            How many variants were made.

        Raises:
            MethodError: If a step needs gradients or refuses a layer, or the numbers do
                not allow it.
            PolicyError: If the other model has other layers.
            PluginError: If a method breaks, or gives other than what it declares.
            StoreError: If variants cannot be written.
        """
        missing = self.missing(wanted) if share.index == 0 else []
        refuse_gradients(self.actions, missing)
        for pair in missing:
            self.actions.storage(*pair)  # refusals speak before anything is computed
        streamed = [pair for pair in missing if self._is_streamed(pair[1])]
        twins = twins_of(streamed, self.inventory, self.origin.inventory)
        self._maker().make_each(p for p in missing if not self._is_streamed(p[1]))
        if streamed:
            self._carry({(twins[la], action): la for la, action in streamed}, progress)
        return len(missing)

    def _carry(self, wanted: Mapping[Pair, Layer], progress: Progress | None) -> None:
        """Pass over the other model, and make this one's variants on the way."""
        origin = self.origin
        lost = origin._lost_references(wanted)
        steep = gradient_needs(origin.actions, origin.inventory, lost)
        origin.stitched.claim(origin.name)
        with origin._maker().on_dense():
            maker = Carrier.of(
                origin._maker(steep),
                self._maker(),
                wanted=wanted,
                own=frozenset(origin.reference.items()),
            )
            origin._streaming(maker, ALL).run(list(wanted), progress)


@dataclass(frozen=True, eq=False, kw_only=True)
class Carrier(VariantMaker):
    """Makes one model's variants from another's statistics, as they stream by.

    Of the model whose statistics they are, it makes what the reference lacks.

    Attributes:
        other: Makes the variants of the model that takes statistics over.
        wanted: Layers of this model with actions, and the other model's layers.
        own: Layers of this model with the reference's actions.
    """

    other: VariantMaker
    wanted: Mapping[Pair, Layer]
    own: frozenset[Pair]

    @classmethod
    def of(
        cls,
        maker: VariantMaker,
        other: VariantMaker,
        *,
        wanted: Mapping[Pair, Layer],
        own: frozenset[Pair],
    ) -> Self:
        """Let a maker of one model serve another one."""
        shared = {
            field.name: getattr(maker, field.name) for field in fields(VariantMaker)
        }
        return cls(**shared, other=other, wanted=wanted, own=own)

    def make_each(
        self, pairs: Pairs, statistics: InputStatistics = NO_STATISTICS
    ) -> None:
        """Make variants layer by layer, of either model as they are lacked."""
        pairs = list(pairs)
        self.other.make_each(self._carried(pairs), statistics)
        super().make_each(self._lost(pairs), statistics)

    def make_block(
        self, pairs: Pairs, sums: dict[str, Gathering], *, keep: bool = False
    ) -> None:
        """Make a block's variants, of either model as they are lacked."""
        pairs = list(pairs)
        self.other.make_block(self._carried(pairs), sums, keep=True)
        super().make_block(self._lost(pairs), sums, keep=keep)

    def _carried(self, pairs: Sequence[Pair]) -> list[Pair]:
        found = [(self.wanted[pair], pair[1]) for pair in pairs if pair in self.wanted]
        return [pair for pair in found if self.other.lacks(*pair)]

    def _lost(self, pairs: Sequence[Pair]) -> list[Pair]:
        return [pair for pair in pairs if pair in self.own and self.lacks(*pair)]


def refuse_gradients(actions: Actions, pairs: Pairs) -> None:
    """Refuse actions that read gradients, which belong to a model's own weights.

    Raises:
        MethodError: If there is one; names the method.
    """
    for layer, action in pairs:
        for step in action.steps:
            if found := actions.method(step).needs & GRADIENTS:
                raise MethodError(
                    f"{layer.name} under {str(action)!r}: {step.method} reads "
                    f"{' and '.join(sorted(found))}, which no other model's text gives "
                    "for these weights. Take statistics anew"
                )


def twins_of(
    pairs: Pairs, inventory: Inventory, origin: Inventory
) -> dict[Layer, Layer]:
    """Find the layers of the other model whose statistics are wanted.

    Args:
        pairs: Layers with actions that need statistics.
        inventory: The layers of the model.
        origin: Those of the other model.

    Raises:
        PolicyError: If one is absent there, or of another shape or structure.
    """
    known = {layer.name: layer for layer in origin.layers}
    found = {}
    for layer, _ in pairs:
        twin = known.get(layer.name)
        if twin is None or _told(twin) != _told(layer):
            raise PolicyError(
                f"statistics of another model do not fit: {layer.name} is "
                f"{_told(layer)}, and there {_told(twin) if twin else 'is none'}. Take "
                "statistics anew"
            )
        found[layer] = twin
    return found


def _told(layer: Layer) -> str:
    """Say what statistics have to fit."""
    cuts = [cut for cut in (layer.cut, layer.hidden) if cut]
    units = [f"{cut.units} {cut.kind} of {cut.unit} {cut.axis}" for cut in cuts]
    return ", ".join(["{} x {}".format(*layer.shape), *units])
