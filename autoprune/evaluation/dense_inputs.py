"""Statistics of what layers read in the dense model, block by block."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from autoprune.evaluation.workbench import Workbench
from autoprune.models.blocks import BlockRunner
from autoprune.models.statistics import Gathering, InputStatistics
from autoprune.policy import Layer


def dense_statistics(
    bench: Workbench, layers: Sequence[Layer], need: str
) -> Iterator[tuple[Layer, InputStatistics]]:
    """Gather statistics of the dense model's inputs, a block at a time.

    Args:
        bench: The model, which is made dense, and the split of statistics.
        layers: In blocks; each with an input.
        need: One of ``STATISTICS``.

    Yields:
        Every layer in the order of the blocks, and what its input has shown.
    """
    bench.stitched.restore()
    ids = bench.splits["statistics"].ids
    runner = BlockRunner(bench.stitched.model, bench.inventory, ids)
    hidden = runner.start()
    for block in range(len(bench.inventory.blocks)):
        here = [layer for layer in layers if layer.block == block]
        sums = {str(la.input): Gathering({need}, la.shape[1]) for la in here}
        hidden = runner.collect(block, hidden, partial(_add, sums), inputs=sums)
        known = {name: one.result() for name, one in sums.items()}
        yield from ((layer, known[str(layer.input)]) for layer in here)


def _add(sums: Mapping[str, Gathering], name: str, inputs: Tensor) -> None:
    sums[name].add(inputs)
