"""How many zeros every layer gets, by scores of gradients ranked over all layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from autoprune.compression.gradients import measure_gradients
from autoprune.errors import ModelError
from autoprune.evaluation.workbench import Workbench
from autoprune.hookspecs import hookimpl
from autoprune.models.flow import network_of_sizes, synaptic_flows
from autoprune.models.gradients import LayerGradients, TaskLoss
from autoprune.models.layers import read_weight
from autoprune.policy import Layer
from autoprune.searching.formulas import Formula, Ladder

Floats = NDArray[np.float64]

LEAST_SHARE = 0.25
"""Share of the mean density that a ranking leaves every layer: none is emptied."""

ROUNDS = 100
"""Rounds of SynFlow, as in the paper."""

_KEYS = 2**16


def keys_of(scores: Float[Tensor, "out in"], name: str) -> Int[Tensor, "out in"]:
    """Give numbers from 0 to 65535 in the order of the scores, rounded to bfloat16.

    Raises:
        ModelError: If a score is NaN or infinite; names the layer.

    Example:
        >>> keys_of(torch.tensor([[-2.0, -0.0], [0.0, 1.0]]), "q").argsort().tolist()
        [[0, 1], [0, 1]]
    """
    low, high = scores.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ModelError(f"the scores of {name} hold NaN or infinity")
    bits = scores.bfloat16().contiguous().view(torch.int16).int()
    half = _KEYS // 2
    return torch.where(bits < 0, -1 - bits, bits + half)


@dataclass(frozen=True, eq=False)
class Ranking:
    """All weights in the order of their scores, counted by layer and score.

    Attributes:
        counts: Weights of each layer that have each key, from the ``first`` on.
        first: The smallest key that occurs.
        target: Share of all weights to remove.
    """

    counts: Float[np.ndarray, "layers keys"]
    first: int
    target: float

    @classmethod
    def of(cls, keys: Sequence[Int[Tensor, "_out _in"]], target: float) -> "Ranking":
        """Count the keys of every layer."""
        counted = torch.stack(
            [torch.bincount(k.flatten(), minlength=_KEYS) for k in keys]
        )
        occurring = counted.sum(0).nonzero()
        first, last = int(occurring[0]), int(occurring[-1])
        return cls(counted[:, first : last + 1].double().numpy(), first, target)

    @cached_property
    def shares(self) -> Float[np.ndarray, " layers"]:
        """Share that each layer loses; of weights with one key, each layer's in part.

        No layer loses so many that it keeps less than ``LEAST_SHARE`` of the mean.
        """
        numel = self.counts.sum(1)
        most = (1 - LEAST_SHARE * (1 - self.target)) * numel
        gone = np.minimum(np.cumsum(self.counts, axis=1), most[:, None])
        wanted, totals = self.target * numel.sum(), gone.sum(0)
        last = min(int(np.searchsorted(totals, wanted)), len(totals) - 1)
        before = gone[:, last - 1] if last else np.zeros(len(numel))
        step = gone[:, last] - before
        shares: Floats = (before + step * (wanted - before.sum()) / step.sum()) / numel
        return shares

    @property
    def limits(self) -> list[int]:
        """For each layer a key: weights below it are lost, no more than its share."""
        removed = self.shares * self.counts.sum(1)
        within = np.cumsum(self.counts, axis=1) <= removed[:, None] + 0.5
        return [self.first + int(count) for count in within.sum(1)]


def _gradients(
    ladder: Ladder, bench: Workbench, need: str
) -> Mapping[Layer, LayerGradients]:
    bench.stitched.restore()
    return measure_gradients(
        bench.stitched.model,
        bench.inventory,
        TaskLoss(bench.task, bench.tokenizer),
        bench.splits["statistics"].ids,
        dict.fromkeys(ladder.layers, {need}),
    )


def _ranked(
    ladder: Ladder, bench: Workbench, slopes: Sequence[Tensor | None], *, signed: bool
) -> Floats:
    """Rank weights times slopes, and tell what share each layer loses."""
    keys = []
    for layer, slope in zip(ladder.layers, slopes, strict=True):
        assert slope is not None
        scores = bench.stitched.dense_weight(layer).float() * slope
        keys.append(keys_of(scores if signed else scores.abs(), layer.name))
    return Ranking.of(keys, ladder.target).shares


class Snip(Formula):
    """Rank the weights of all layers by ``|w g|``.

    How we differ: the batch is the whole split of statistics, the network is trained,
    and a layer keeps at least ``LEAST_SHARE`` of the mean density.
    """

    name = "snip"
    reference = "Lee et al. 2019, SNIP, arXiv:1810.02340, Sec. 4"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios; takes a pass back through the model a window."""
        found = _gradients(ladder, bench, "gradient")
        slopes = [found[layer].mean for layer in ladder.layers]
        return {self.name: _ranked(ladder, bench, slopes, signed=False)}


class GraspRatios(Formula):
    """Rank the weights of all layers by ``w (H g)``, which the gradient rests on.

    How we differ: the batch is the whole split of statistics, the network is trained,
    and a layer keeps at least ``LEAST_SHARE`` of the mean density.
    """

    name = "grasp"
    reference = "Wang et al. 2020, GraSP, arXiv:2002.07376, Sec. 4"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios; takes three passes back through the model a window."""
        found = _gradients(ladder, bench, "hessian_gradient")
        slopes = [found[layer].hessian_gradient for layer in ladder.layers]
        return {self.name: _ranked(ladder, bench, slopes, signed=True)}


class SynFlowRatios(Formula):
    """Rank the weights of all layers by ``|w| dR/d|w|``, in many rounds.

    After each round fewer weights are left, by the same factor, and what flows through
    them is measured again. How we differ: layers that ``R`` does not depend on (queries
    and keys) get the target itself; a layer keeps at least ``LEAST_SHARE`` of the mean
    density, though synaptic flow is made to empty none.
    """

    name = "synflow"
    reference = "Tanaka et al. 2020, SynFlow, arXiv:2006.05467, Alg. 1"

    def ratios(self, ladder: Ladder, bench: Workbench) -> dict[str, Floats]:
        """Give the ratios; needs no text, but takes a hundred short passes."""
        bench.stitched.restore()
        model, ids = bench.stitched.model, bench.splits["statistics"].ids
        loss, ratios = TaskLoss(bench.task, bench.tokenizer), dict[Layer, float]()
        with network_of_sizes(model):
            reached = synaptic_flows(model, loss, ids, ladder.layers, reached_only=True)
            layers = list(reached)
            for done in range(ROUNDS):
                flows = synaptic_flows(model, loss, ids, layers) if done else reached
                keys = [
                    keys_of(read_weight(model, layer) * flows[layer], layer.name)
                    for layer in layers
                ]
                density = (1 - ladder.target) ** ((done + 1) / ROUNDS)
                ranking = Ranking.of(keys, 1 - density)
                ratios |= dict(zip(layers, ranking.shares.tolist(), strict=True))
                for layer, own, limit in zip(layers, keys, ranking.limits, strict=True):
                    read_weight(model, layer).mul_(own >= limit)
        found = [ratios.get(layer, ladder.target) for layer in ladder.layers]
        return {self.name: np.array(found)}


@hookimpl
def register_formulas() -> list[Formula]:
    """Return the formulas."""
    return [Snip(), GraspRatios(), SynFlowRatios()]
