"""ZipLM: units go one by one, each at the least exact cost, and the rest makes it good.

With ``W`` the weight of the layer that takes the units, best for the units that are
left, and ``C`` the inverse of their Hessian, losing unit ``b`` costs
``tr(W_b [C_bb]⁻¹ W_bᵀ)`` of squared output error if all others are updated by
``-W_b [C_bb]⁻¹ C_b``. Then ``b`` is eliminated from ``C``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.factor import factorise
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.obs import inverse_and_hessian
from autoprune.compression.structured import (
    KEEP,
    StructuredMethod,
    kept_units,
    masked,
)
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics

PANEL = 64
"""Columns that are eliminated before matrices are brought up to date (measured)."""

Blocks = Float[Tensor, "units unit unit"]
"""What stands on the diagonal of a matrix, for each unit."""


class ZipLm(StructuredMethod):
    """Remove the units of a site one at a time, the cheapest first, as a surgeon does.

    The cost of a unit is the error of the taker's outputs after the best update of all
    columns that are left. So of units that say the same one goes, and the others take
    over what it did. One sweep serves every width: a narrower one goes on where a wider
    one has stopped. Layers that make the units lose their rows and stay as they are.
    Time grows with the cube of the taker's inputs: 576 by 1536 weights, down to 128
    channels, take 1.2 s, half of it for the sweep (measured on one thread).

    How we differ: the sweep carries ``Wᵀ W`` in the place of ``W``, which is all that
    costs need, and eliminates columns in panels; weights are then solved for on the
    units that are left, which is where the updates lead. Widths are chosen by the
    search, not by a table of latencies inside of the method.
    """

    name = "ziplm"
    reference = "Kurtic et al. 2023, ZipLM, arXiv:2302.04089"
    needs = frozenset({"hessian"})
    parameters = (
        KEEP,
        # With less, of two equal inputs only rounding would be left to downdate.
        replace(preconditions.DAMPING, low=1e-6),
    )

    def scores(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Settings,
    ) -> Float[Tensor, " units"]:
        """Tell what each unit costs if it is the first to go."""
        weight, inverse, _ = _problem(sources, statistics, settings["damping"])
        return Sweep(weight, inverse, _unit(sources[-1])).costs()

    def compress_site(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants of all layers of a site; all widths come from one sweep."""
        for source in sources[:-1]:
            preconditions.finite_weight(source)
        cut = sources[-1].layer.cut
        assert cut is not None
        counts = [cut.units - kept_units(cut, one["keep"]) for one in settings]
        found: dict[tuple[float, int], list[Variant]] = {}
        for damping in dict.fromkeys(one["damping"] for one in settings):
            weight, inverse, hessian = _problem(sources, statistics, damping)
            parts = zip(settings, counts, strict=True)
            wanted = {n for one, n in parts if one["damping"] == damping}
            order = Sweep(weight, inverse, cut.unit).remove(max(wanted))[0]
            for count in sorted(wanted):
                kept = torch.ones(cut.units, dtype=torch.bool)
                kept[order[:count]] = False
                best = best_on_units(weight, hessian, kept)
                made = [masked(source, kept) for source in sources[:-1]]
                found[damping, count] = [*made, masked(sources[-1], kept, best)]
        by_setting = [
            found[one["damping"], count]
            for one, count in zip(settings, counts, strict=True)
        ]
        return [list(variants) for variants in zip(*by_setting, strict=True)]


class Sweep:
    """Units of a layer's columns, eliminated one at a time.

    Every elimination lowers ``C`` by ``Pᵀ P`` and ``G = Wᵀ W`` by ``Rᵀ P + Pᵀ R``,
    with as many rows in ``P`` and ``R`` as a unit has columns. These are kept apart and
    subtracted a panel at a time, as one matrix product; a row that is needed before is
    brought up to date alone.

    Args:
        weight: Of the layer that takes the units; never written to.
        inverse: Inverse of the Hessian of its inputs; never written to.
        unit: Columns of a unit.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        inverse: Float[Tensor, "in in"],
        unit: int,
    ) -> None:
        self._unit = unit
        self._inverse, self._gram = inverse.clone(), weight.T @ weight
        self._inverse_blocks = _diagonal_blocks(self._inverse, unit)
        self._gram_blocks = _diagonal_blocks(self._gram, unit)
        self._open = torch.ones(weight.shape[1], dtype=inverse.dtype)
        shape = max(PANEL, unit), weight.shape[1]
        self._lower, self._mixed = inverse.new_empty(shape), inverse.new_empty(shape)
        self._used = 0

    def costs(self) -> Float[Tensor, " units"]:
        """Tell what losing each unit costs now; infinity where it is gone."""
        inverse, gram = self._inverse_blocks, self._gram_blocks
        left = self._open[:: self._unit] > 0
        if self._unit == 1:
            costs = gram[:, 0, 0] / inverse[:, 0, 0]
            return costs.masked_fill_(~left, torch.inf)
        costs = inverse.new_full((len(inverse),), torch.inf)
        factor = torch.linalg.cholesky(inverse[left])
        solved = torch.cholesky_solve(gram[left], factor)
        costs[left] = solved.diagonal(dim1=1, dim2=2).sum(1)
        return costs

    def remove(
        self, count: int
    ) -> tuple[Int[Tensor, " count"], Float[Tensor, " count"]]:
        """Remove the cheapest unit, so many times; earlier ones first on ties.

        Returns:
            The units in the order in which they went, and what each one cost.
        """
        order, costs = [], []
        for _ in range(count):
            cost, at = self.costs().min(0)
            order.append(int(at))
            costs.append(float(cost))
            self._eliminate(order[-1])
        dtype = self._inverse.dtype
        return torch.tensor(order, dtype=torch.long), torch.tensor(costs, dtype=dtype)

    def _eliminate(self, at: int) -> None:
        unit, used = self._unit, self._used
        here = slice(at * unit, (at + 1) * unit)
        lower, mixed = self._lower[:used], self._mixed[:used]
        inverse = self._inverse[here] - lower[:, here].T @ lower
        gram = self._gram[here] - mixed[:, here].T @ lower
        gram -= lower[:, here].T @ mixed
        root = _inverse_root(inverse[:, here])
        # What is gone takes no further part; rounding must not bring it back.
        low, mix = root @ inverse * self._open, root @ gram * self._open
        mix -= 0.5 * (mix[:, here] @ root.T) @ low
        shape = unit, -1, unit
        low_parts, mix_parts = low.view(shape), mix.view(shape)
        self._inverse_blocks -= _products(low_parts, low_parts)
        change = _products(low_parts, mix_parts)
        self._gram_blocks -= change + change.mT
        self._open[here] = 0.0
        self._lower[used : used + unit], self._mixed[used : used + unit] = low, mix
        self._used += unit
        if self._used + unit > len(self._lower):
            self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        lower, mixed = self._lower[: self._used], self._mixed[: self._used]
        self._inverse.addmm_(lower.T, lower, alpha=-1)
        left, right = torch.cat([lower, mixed]), torch.cat([mixed, lower])
        self._gram.addmm_(left.T, right, alpha=-1)
        self._used = 0


def best_on_units(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    kept: Bool[Tensor, " units"],
) -> Float[Tensor, "out in"]:
    """Give the weight with the least output error among those that use kept units.

    It solves ``X H_SS = (W H)_S`` over the columns ``S`` of these units.
    """
    columns = kept.repeat_interleave(weight.shape[1] // len(kept)).nonzero()[:, 0]
    taken = hessian[:, columns]
    factor = torch.linalg.cholesky(taken[columns])
    best = torch.zeros_like(weight)
    best[:, columns] = torch.cholesky_solve((weight @ taken).T, factor).T
    return best


def _problem(
    sources: Sequence[Source], statistics: Mapping[str, InputStatistics], damping: float
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"], Float[Tensor, "in in"]]:
    """Give the taker's weight, the inverse Hessian and the Hessian, in float64."""
    taker = sources[-1]
    read = statistics[str(taker.layer.input)]
    factor = factorise(
        preconditions.finite_hessian([taker], read),
        damping=damping,
        act_order=False,
        names=[taker.layer.name],
    )
    weight = preconditions.finite_weight(taker).double()
    return weight.masked_fill(factor.dead, 0.0), *inverse_and_hessian(factor)


def _unit(source: Source) -> int:
    assert source.layer.cut is not None
    return source.layer.cut.unit


def _diagonal_blocks(matrix: Float[Tensor, "in in"], unit: int) -> Blocks:
    """Copy what stands on the diagonal, in blocks."""
    cut = matrix.view(-1, unit, len(matrix) // unit, unit)
    return cut.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _inverse_root(matrix: Float[Tensor, "unit unit"]) -> Float[Tensor, "unit unit"]:
    """Invert the Cholesky factor of a block of the inverse Hessian."""
    if len(matrix) == 1:
        return matrix.rsqrt()
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    factor = torch.linalg.cholesky(matrix)
    root: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return root


def _products(
    first: Float[Tensor, "rank units unit"], second: Float[Tensor, "rank units unit"]
) -> Blocks:
    """Multiply what two matrices have of each unit, the first one transposed."""
    if first.shape[2] == 1:  # many tiny products are slow
        return (first * second).transpose(0, 1)
    return torch.einsum("kui,kuj->uij", first, second)


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the methods."""
    return [ZipLm()]
