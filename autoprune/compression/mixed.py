"""Variants of two banks on one model: each layer has those of one or of the other."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

from autoprune.compression.bank import VariantBank
from autoprune.compression.needs import Pairs
from autoprune.compression.shares import ALL, Share
from autoprune.compression.streaming import Progress
from autoprune.compression.variant import Variant
from autoprune.policy import Action, Layer, digest


@dataclass(eq=False, kw_only=True)
class MixedBank(VariantBank):
    """A bank whose variants are those of another bank at some layers.

    Attributes:
        own: Whose variants most layers have.
        other: Whose variants the layers in ``taken`` have.
        taken: Layers; all of a site's or none, as structures are of one piece.
    """

    own: VariantBank
    other: VariantBank
    taken: frozenset[Layer]

    @classmethod
    def of(cls, own: VariantBank, other: VariantBank, taken: frozenset[Layer]) -> Self:
        """Mix two banks of one model."""
        shared = {field.name: getattr(own, field.name) for field in fields(VariantBank)}
        return cls(**shared, own=own, other=other, taken=taken)

    @cached_property
    def name(self) -> str:
        """Fingerprint of both banks, and of which layer has whose variants."""
        layers = sorted(layer.name for layer in self.taken)
        return digest([self.own.name, self.other.name, layers])

    def key(self, layer: Layer, action: Action) -> str:
        """Name a variant as its own bank does: it is made once for both."""
        return self._of(layer).key(layer, action)

    def get(self, layer: Layer, action: Action) -> Variant:
        """Give a variant of the layer's bank, making it if it is absent."""
        return self._of(layer).get(layer, action)

    def put(self, wanted: Mapping[Layer, Action]) -> int:
        """Put a policy's variants on the model; tell how many layers were rewritten."""
        # A bank that makes variants takes those of others off: so all are there before.
        self.make(wanted.items())
        for layer, action in wanted.items():
            self.weight(layer, action)
        return super().put(wanted)

    def make(
        self,
        wanted: Pairs,
        progress: Progress | None = None,
        share: Share = ALL,
    ) -> int:
        """Make what is missing in each bank, in a pass of its own."""
        pairs, made = list(wanted), 0
        for bank in (self.own, self.other):
            its = [pair for pair in pairs if self._of(pair[0]) is bank]
            made += bank.make(its, progress, share)
        return made

    def _of(self, layer: Layer) -> VariantBank:
        return self.other if layer in self.taken else self.own
