"""The error-compensated column sweep of SparseGPT and GPTQ, for many rows at once.

Columns are settled from first to last: pruned, rounded or kept. What a settled column
lost is made good by the columns after it, as the Hessian of the inputs tells. Rows do
not see each other, so layers that share an input, and all settings of a call, are
stacked as rows of one sweep and share one factorisation.

The papers update all later columns whenever one is settled. Here a column is updated
when its turn comes, by the errors of all columns before it: the same numbers, but
almost all work becomes matrix products, between tiles of 128 columns and, inside of a
tile, by halving until ``LEAF`` columns are left, which are settled one by one.
"""

from collections.abc import Sequence
from math import lcm

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.factor import Factor
from autoprune.compression.grids import grid_of_range
from autoprune.compression.masks import (
    kept_of_group,
    kth_smallest,
    pruned_count,
    smallest,
)
from autoprune.compression.method import keep_of
from autoprune.compression.stack import Rule, Stack, Swept, Unit

TILE = 128
"""Columns whose mask is chosen at once, as in the SparseGPT paper."""

LEAF = 16
"""Columns that are settled one by one, without a matrix product between (measured)."""

ROWS_AT_ONCE = 8192
"""Rows that are settled together inside of a tile, so that they stay in the cache."""

CHUNK_BYTES = 256 * 2**20
"""Most memory for the errors of stacked rows; beyond it, parts go one after another."""


def sweep(
    weights: Sequence[Float[Tensor, "_ in"]],
    factor: Factor,
    rules: Sequence[Rule],
    *,
    kept: Sequence[Bool[Tensor, "_ in"] | None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[list[Swept]]:
    """Sweep layers that share an input under rules of one kind.

    Grids are fitted when a sweep reaches their group, as GPTQ does. Grids of whole
    rows, and all when the factor reorders columns, come from the original weights.

    Args:
        weights: Weights in any float type, computed with in float32; never written to.
        factor: Of the Hessian of their common input.
        rules: Of equal ``kind``.
        kept: For each layer, the mask of an earlier step; pruned weights stay zeros.
        dtype: Type in which scales, and weights without codes, are returned.

    Returns:
        For each layer, one entry a rule.
    """
    assert len({rule.kind for rule in rules}) == 1, "rules of one sweep differ in kind"
    masks = kept or [None] * len(weights)
    results: list[list[Swept]] = []
    for part in _parts_of_layers([len(w) for w in weights], weights[0].shape[1]):
        stack = Stack.of(weights[part], masks[part], factor)
        size = max(1, CHUNK_BYTES // (stack.base.numel() * 4))
        swept: list[list[Swept]] = [[] for _ in stack.spans]
        for first in range(0, len(rules), size):
            made = _Sweep(stack, factor, rules[first : first + size], dtype).run()
            for index, one in enumerate(made):  # rules outermost
                swept[index % len(stack.spans)].append(one)
        results.extend(swept)
    return results


def _parts_of_layers(rows: Sequence[int], columns: int) -> list[slice]:
    """Cut a list of layers so that one rule over a part fits in the memory."""
    parts, first, size = [], 0, 0
    for index, count in enumerate(rows):
        if index > first and (size + count) * columns * 4 > CHUNK_BYTES:
            parts.append(slice(first, index))
            first, size = index, 0
        size += count
    return [*parts, slice(first, len(rows))]


class _Sweep:
    """One sweep of stacked rows: its buffers, and the steps from tile to column.

    Buffers of a tile, ``[tile, rows]``: ``now``, the weights as compensated so far;
    ``keep``, 1.0 or 0.0; ``settled``, the outcome, as codes less their zero where
    quantized. ``errors``, ``[in, rows]``, has what each settled column was off.
    """

    def __init__(
        self, stack: Stack, factor: Factor, rules: Sequence[Rule], dtype: torch.dtype
    ) -> None:
        rule, (columns, rows) = rules[0], stack.base.shape
        self.stack, self.factor, self.copies = stack, factor, len(rules)
        self.quantized, self.pattern = rule.bits is not None, rule.pattern
        self.prunes = rule.sparsity is not None or rule.pattern is not None
        self.masks = self.prunes or stack.kept is not None
        self.dtype, self.columns, self.rows = dtype, columns, rows * len(rules)
        self.group = rule.group or columns
        self.static = factor.order is not None or self.group == columns
        of = keep_of(rule.pattern)[1] if rule.pattern else 1
        self.leaf = of if rule.pattern else LEAF
        # Columns that are settled without a cut: patterns, and groups yet to be fitted.
        self.whole = lcm(of, 1 if self.static else self.group)
        self.tile = self.whole * max(1, TILE // self.whole)
        final = torch.uint8 if self.quantized else dtype
        self.units = [
            Unit.empty(one, span, columns, final=final, masks=self.masks)
            for at, one in enumerate(rules)
            for span in stack.spans_from(at * rows)
        ]
        self.errors = torch.empty(columns, self.rows)
        if self.quantized:
            positions = torch.arange(columns) if factor.order is None else factor.order
            self.groups = (positions // self.group).tolist()
            shape = columns // self.group, self.rows
            self.scales, self.low, self.high = (torch.empty(shape) for _ in range(3))

    def run(self) -> list[Swept]:
        """Sweep all columns; results with rules outermost, layers within."""
        if self.quantized and self.static:
            self._fit_static()
        for first in range(0, self.columns, self.tile):
            self._settle_tile(first, min(first + self.tile, self.columns))
        return [self._result(unit) for unit in self.units]

    def _settle_tile(self, first: int, last: int) -> None:
        stack, feedback = self.stack, self.factor.feedback
        self.first = first
        self.now = stack.base[first:last].repeat(1, self.copies).float()
        if first:
            self.now.addmm_(feedback[first:last, :first], self.errors[:first])
        self.settled = torch.empty_like(self.now)
        if stack.kept is not None:
            self.keep = stack.kept[first:last].repeat(1, self.copies).float()
        elif self.prunes:
            self.keep = torch.ones_like(self.now)
            if self.pattern is None:
                self._choose_kept(first, last)
        fits = self.quantized and not self.static
        for start in range(first, last, self.whole if fits else self.tile):
            stop = min(start + self.whole, last) if fits else last
            part = self.now[start - first : stop - first]
            if start > first:
                part.addmm_(feedback[start:stop, first:start], self.errors[first:start])
            if fits:
                self._fit_reached(start, stop)
            for at in range(0, self.rows, ROWS_AT_ONCE):
                self._settle(start, stop, slice(at, at + ROWS_AT_ONCE))
        self._write(first, last)

    def _choose_kept(self, first: int, last: int) -> None:
        """Choose the mask of a tile; all weights that a layer has in it compete."""
        for unit in self.units:
            assert unit.rule.sparsity is not None
            scores = self.now[:, unit.span].square()
            scores *= self.factor.cost[first:last, None]
            # Rounded over all tiles so far, so that they add up to the layer's count.
            rows, sparsity = scores.shape[1], unit.rule.sparsity
            count = pruned_count(rows * last, sparsity)
            count -= pruned_count(rows * first, sparsity)
            if not count:
                continue
            kept = scores > kth_smallest(scores.view(1, -1), count)
            if int(kept.sum()) != kept.numel() - count:  # ties: earlier in a row first
                kept = ~smallest(scores.t().reshape(1, -1), count)
                kept = kept.view(rows, -1).t()
            self.keep[:, unit.span] = kept

    def _settle(self, first: int, last: int, rows: slice) -> None:
        """Settle columns of a tile, halving until a leaf is left."""
        if last - first <= self.leaf:
            self._settle_leaf(first, last, rows)
            return
        middle = first + max(1, (last - first) // self.leaf // 2) * self.leaf
        self._settle(first, middle, rows)
        later = self.now[middle - self.first : last - self.first, rows]
        feedback = self.factor.feedback[middle:last, first:middle]
        later.addmm_(feedback, self.errors[first:middle, rows])
        self._settle(middle, last, rows)

    def _settle_leaf(self, first: int, last: int, rows: slice) -> None:
        """Settle columns one by one: the loop in which all Python time is spent."""
        inside = slice(first - self.first, last - self.first)
        now, errors = self.now[inside, rows], self.errors[first:last, rows]
        keep = self.keep[inside, rows] if self.masks else None
        feedback = self.factor.feedback[first:last, first:last]
        if self.pattern is not None:
            assert keep is not None
            scores = now.square() * self.factor.cost[first:last, None]
            keep.copy_(kept_of_group(scores, keep_of(self.pattern)[0]))
        lines = zip(
            now.unbind(),
            self.settled[inside, rows].unbind(),
            errors.unbind(),
            strict=True,
        )
        for at, (value, outcome, error) in enumerate(lines):
            if at:
                torch.addmv(value, errors[:at].t(), feedback[at, :at], out=value)
            if self.quantized:
                group = self.groups[first + at]
                scale = self.scales[group, rows]
                torch.div(value, scale, out=outcome).round_()
                outcome.clamp_(self.low[group, rows], self.high[group, rows])
                if keep is not None:
                    outcome *= keep[at]
                torch.addcmul(value, outcome, scale, value=-1, out=error)
                continue
            if keep is None:
                outcome.copy_(value)
            else:
                torch.mul(value, keep[at], out=outcome)
            torch.sub(value, outcome, out=error)

    def _fit_static(self) -> None:
        base = self.stack.base
        if self.factor.order is not None:
            base = base[self.factor.order.argsort()]
        ends = base.view(-1, self.group, base.shape[1]).aminmax(dim=1)
        low, high = (end.repeat(1, self.copies).float() for end in ends)
        self._fit(low, high, slice(0, len(low)))

    def _fit_reached(self, first: int, last: int) -> None:
        inside = slice(first - self.first, last - self.first)
        weights = self.now[inside]
        if self.masks:
            weights = weights * self.keep[inside]
        low, high = weights.view(-1, self.group, self.rows).aminmax(dim=1)
        self._fit(low, high, slice(first // self.group, last // self.group))

    def _fit(
        self,
        low: Float[Tensor, "groups rows"],
        high: Float[Tensor, "groups rows"],
        groups: slice,
    ) -> None:
        for unit in self.units:
            bits, span = unit.rule.bits, unit.span
            assert bits is not None
            scale, zero = grid_of_range(
                low[:, span],
                high[:, span],
                bits=bits,
                symmetric=unit.rule.symmetric,
                dtype=self.dtype,
            )
            self.scales[groups, span] = scale
            self.low[groups, span] = -zero
            self.high[groups, span] = 2**bits - 1 - zero

    def _write(self, first: int, last: int) -> None:
        """Put the settled tile into the results, while it is in the cache."""
        if self.quantized:
            self.settled -= self.low[self.groups[first:last]]
        columns: slice | Tensor = slice(first, last)
        if self.factor.order is not None:
            columns = self.factor.order[first:last]
        for unit in self.units:
            unit.settled[:, columns] = (
                self.settled[:, unit.span].t().to(unit.settled.dtype)
            )
            if unit.kept is not None:
                unit.kept[:, columns] = self.keep[:, unit.span].t().bool()

    def _result(self, unit: Unit) -> Swept:
        if not self.quantized:
            return Swept(weight=unit.settled, kept=unit.kept)
        scales = self.scales[:, unit.span].t().to(self.dtype).contiguous()
        zeros = None
        if not unit.rule.symmetric:
            zeros = (-self.low[:, unit.span]).t().to(torch.uint8).contiguous()
        return Swept(kept=unit.kept, codes=unit.settled, scales=scales, zeros=zeros)
