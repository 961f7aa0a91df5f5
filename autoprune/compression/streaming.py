"""Makes variants block by block, on what the blocks read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from autoprune.compression.heap import give_back_free_memory
from autoprune.compression.needs import (
    gatherings,
)
from autoprune.compression.shares import ALL, Share, awaited
from autoprune.compression.variant_maker import Pair, VariantMaker, weight_bytes
from autoprune.models.blocks import BlockRunner, Hidden
from autoprune.models.hidden_statistics import gather_hidden
from autoprune.models.inputs import OnInput
from autoprune.models.statistics import Gathering
from autoprune.policy import DENSE, Action, Layer

Progress = Callable[[int, int], None]
"""Is told the blocks that are done, and the blocks to do."""


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
        share: The blocks that are made here; other processes make the rest.
    """

    maker: VariantMaker
    runner: BlockRunner
    reference: Mapping[Layer, Action]
    share: Share = ALL

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
        if (
            whole and self.share.index == 0
        ):  # on dense inputs, whatever the reference is
            model = maker.stitched.model
            found = gather_hidden(model, maker.inventory, self.runner)
            maker.make_each(whole, found)
        return [pair for pair in wanted if pair not in whole]

    def _put_outside(self) -> None:
        """Put the reference's variants on the embedding, before any block is run."""
        for pair in self._compressed():
            if pair[0].block is None:
                weight = self.maker.stored_weight(*pair)
                if weight is None and self.share.has(None):  # absent, or damaged
                    self.maker.make_each([pair])
                elif weight is None:
                    weight = self._awaited(pair)
                self.maker.put(*pair, weight)

    def _pass_block(self, block: int, hidden: Hidden, wanted: Sequence[Pair]) -> Hidden:
        """Make the variants of one block, and give what the next one reads."""
        maker, mine = self.maker, self.share.has(block)
        reference = [pair for pair in self._compressed() if pair[0].block == block]
        if not mine and not reference:
            return self.runner.run(block, hidden)
        kept = {pair: maker.stored_weight(*pair) for pair in reference} if mine else {}
        absent = [pair for pair, weight in kept.items() if weight is None]
        if mine:
            leaving = self._make(block, hidden, wanted, absent)
            if not reference:
                return leaving
            del leaving  # of the dense block, and as large as what enters it
        for pair in reference:
            weight = kept.pop(pair, None)
            maker.put(*pair, self._awaited(pair) if weight is None else weight)
        leaving = self.runner.run(block, hidden)
        for layer, _ in reference:  # else the weights of all blocks so far would stay
            maker.stitched.write(layer, DENSE, None)
        give_back_free_memory(after=weight_bytes(layer for layer, _ in reference))
        return leaving

    def _make(
        self,
        block: int,
        hidden: Hidden,
        wanted: Sequence[Pair],
        absent: Sequence[Pair],
    ) -> Hidden:
        """Gather what a dense block reads, make variants from it, run the block.

        Where others wait for the reference's variants, those come first.
        """
        maker = self.maker
        pairs = dict.fromkeys([*wanted, *absent])
        sums = gatherings(maker.actions, maker.inventory, list(pairs))
        leaving = self.runner.collect(block, hidden, _into(sums), inputs=sums)
        if absent and not self.share.alone:
            maker.make_block(absent, sums, keep=True)
            pairs = {pair: None for pair in pairs if pair not in absent}
        maker.make_block(pairs, sums)
        return leaving

    def _awaited(self, pair: Pair) -> Tensor:
        """Give a variant's weight, once whoever makes it has made it."""
        layer, action = pair
        what = f"the variant of {layer.name} under {str(action)!r}"
        return awaited(lambda: self.maker.stored_weight(layer, action), what)

    def _compressed(self) -> list[Pair]:
        """List the layers that the reference does not leave dense."""
        return [pair for pair in self.reference.items() if pair[1].steps]


def _into(sums: Mapping[str, Gathering]) -> OnInput:
    return lambda name, inputs: sums[name].add(inputs)
