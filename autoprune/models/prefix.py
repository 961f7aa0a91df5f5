"""Remembers what leaves every block, so that later policies run only what they change.

A policy that differs from the anchor in block 17 only gives the same hidden states as
the anchor up to there: blocks 0 to 16 answer from memory, and the cost falls by what
they would have cost. What comes out is the same to the bit, because the blocks that run
are given the same numbers in the same batches.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from autoprune.models.blocks import answering as answering
from autoprune.models.layers import Inventory
from autoprune.policy import Layer

CAP_BYTES = 2 << 30
"""Most bytes of hidden states: about 120 windows of 512 tokens of a 135M model."""


@dataclass(frozen=True, eq=False)
class _Left:
    """What left one block.

    Attributes:
        hidden: The hidden states.
        extra: How much more the block gave, in a tuple; None if it gave them bare.
    """

    hidden: Float[Tensor, "_ ..."]
    extra: int | None

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """Answer in the block's place, whatever it is given."""
        if self.extra is None:
            return self.hidden
        return (self.hidden, *[None] * self.extra)


Variants = Mapping[Layer, Hashable]
"""What names the variant on every layer: the key that a bank gives it, or the action
as long as no other bank's variants come in."""


@dataclass(eq=False)
class _Trail:
    """What one policy has left behind its blocks so far.

    Attributes:
        variants: The policy.
        left: By batch, from the first block on; may end before the last.
    """

    variants: dict[Layer, Hashable]
    left: dict[Hashable, list[_Left]] = field(default_factory=dict)


@dataclass(eq=False)
class Prefix:
    """The hidden states that one policy, the anchor, leaves behind its blocks.

    Beside it one more policy may be followed, and become the anchor if it is found to
    be worth it.

    Attributes:
        inventory: The model's blocks and layers.
        cap_bytes: Most bytes of hidden states. What leaves blocks beyond it is not
            remembered, so these run every time.
    """

    inventory: Inventory
    cap_bytes: int = CAP_BYTES
    _anchor: _Trail | None = field(default=None, init=False)
    _followed: _Trail | None = field(default=None, init=False)

    @property
    def held_bytes(self) -> int:
        """Bytes of hidden states that are held; what two policies share counts once."""
        trails = [trail for trail in (self._anchor, self._followed) if trail]
        held = {
            id(one): one.hidden.nbytes
            for trail in trails
            for left in trail.left.values()
            for one in left
        }
        return sum(held.values())

    def move(self, variants: Variants) -> None:
        """Take a policy as the anchor; what leaves blocks that it shares is kept."""
        shared = self.unchanged(variants)
        known = self._anchor.left if self._anchor else {}
        kept = {batch: left[:shared] for batch, left in known.items()}
        self._anchor = _Trail(dict(variants), kept)

    def follow(self, variants: Variants) -> int:
        """Remember a policy beside the anchor from now on, in the place of another.

        Returns:
            How many leading blocks it shares with the anchor.
        """
        if self._anchor is not None and self._anchor.variants == variants:
            self._followed = None
        elif self._followed is None or self._followed.variants != variants:
            self._followed = _Trail(dict(variants))
        return self.unchanged(variants)

    def adopt(self, variants: Variants) -> None:
        """Take the followed policy as the anchor, if it is this one."""
        if self._followed is not None and self._followed.variants == variants:
            self._anchor, self._followed = self._followed, None

    def unchanged(self, variants: Variants) -> int:
        """Count the leading blocks whose layers, and all before, are as the anchor's.

        A layer outside of all blocks, such as the embedding, comes before every block.
        """
        if self._anchor is None:
            return 0
        changed = [
            layer.block or 0
            for layer in {**self._anchor.variants, **variants}
            if self._anchor.variants.get(layer) != variants.get(layer)
        ]
        return min(changed, default=len(self.inventory.blocks))

    @contextmanager
    def reused(
        self, model: nn.Module, batch: Hashable, unchanged: int
    ) -> Iterator[int]:
        """Let leading blocks answer from memory during a forward pass.

        The anchor itself, all of whose blocks are unchanged, is remembered on the way;
        so is the policy that is followed.

        Args:
            model: The model, with a policy's variants on it.
            batch: Names the tokens that are about to pass: the same name, the same
                tokens in the same order.
            unchanged: Leading blocks that are as the anchor's.

        Yields:
            How many blocks do not run.
        """
        known = self._anchor.left.get(batch, []) if self._anchor else []
        skipped = min(unchanged, len(known))
        blocks = [model.get_submodule(path) for path in self.inventory.blocks]
        answers: dict[nn.Module, Callable[..., Any]] = {
            block: one.answer
            for block, one in zip(blocks[:skipped], known, strict=False)
        }
        trail = self._anchor if unchanged == len(blocks) else self._followed
        handles = []
        if trail is not None:
            left = trail.left[batch] = known[:skipped]
            handles = [
                blocks[index].register_forward_hook(
                    partial(self._remember, left, index)
                )
                for index in range(skipped, len(blocks))
            ]
        try:
            with answering(answers):
                yield skipped
        finally:
            for handle in handles:
                handle.remove()

    def _remember(
        self, left: list[_Left], index: int, block: nn.Module, inputs: Any, output: Any
    ) -> None:
        bare = not isinstance(output, tuple)
        hidden = (output if bare else output[0]).detach()
        full = self.held_bytes + hidden.nbytes > self.cap_bytes
        if full or len(left) < index:  # without a block, those after it are of no use
            return
        left.append(_Left(hidden, None if bare else len(output) - 1))
