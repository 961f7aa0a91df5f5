"""What a sweep is given and gives: rules, layers stacked as rows, and results."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from autoprune.compression.factor import Factor


@dataclass(frozen=True, slots=True)
class Rule:
    """What a sweep does to a layer: prune, quantize, or both.

    Attributes:
        sparsity: Fraction of the layer to remove; None for none or a pattern.
        pattern: ``N:M`` pattern to prune to; None for none or a sparsity.
        bits: Bits of a code; None to leave kept weights unquantized.
        group: Weights of a row that share a scale; None for a whole row.
        symmetric: True for grids without zero points.
    """

    sparsity: float | None = None
    pattern: str | None = None
    bits: int | None = None
    group: int | None = None
    symmetric: bool = False

    @property
    def kind(self) -> tuple[object, ...]:
        """What rules of one sweep must have in common."""
        return self.sparsity is None, self.pattern, self.bits is None, self.group


@dataclass(frozen=True, eq=False)
class Swept:
    """A layer after a sweep.

    Attributes:
        weight: Settled weights, zeros where not kept; None when quantized.
        kept: True where a weight is kept; None if all are.
        codes: Codes; None when not quantized.
        scales: Steps of the grids, representable in the layer's type.
        zeros: Codes of zero; None when symmetric or not quantized.
    """

    weight: Float[Tensor, "out in"] | None = None
    kept: Bool[Tensor, "out in"] | None = None
    codes: UInt8[Tensor, "out in"] | None = None
    scales: Float[Tensor, "out groups"] | None = None
    zeros: UInt8[Tensor, "out groups"] | None = None


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers as rows of one matrix, transposed: a column of the layers is contiguous.

    Attributes:
        base: Original weights, columns in the order of the sweep, dead ones zero; in
            the layers' own type, which mostly takes less than float32.
        kept: True where an earlier step has kept a weight; None if all are.
        spans: Where each layer stands in the rows.
    """

    base: Float[Tensor, "in rows"]
    kept: Bool[Tensor, "in rows"] | None
    spans: tuple[slice, ...]

    @classmethod
    def of(
        cls,
        weights: Sequence[Float[Tensor, "_ in"]],
        masks: Sequence[Bool[Tensor, "_ in"] | None],
        factor: Factor,
    ) -> Self:
        """Stack layers that share the factor's Hessian; weights in any float type."""
        order = slice(None) if factor.order is None else factor.order
        base = torch.cat(list(weights)).t()[order].contiguous()
        base[factor.dead] = 0.0
        kept = None
        if any(mask is not None for mask in masks):
            full = [
                torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
                for weight, mask in zip(weights, masks, strict=True)
            ]
            kept = torch.cat(full).t()[order].contiguous()
        ends = [0, *accumulate(len(weight) for weight in weights)]
        return cls(base, kept, tuple(slice(a, b) for a, b in pairwise(ends)))

    def spans_from(self, row: int) -> list[slice]:
        """Tell where the layers stand in a copy of the rows that starts at ``row``."""
        return [slice(row + span.start, row + span.stop) for span in self.spans]


@dataclass(frozen=True, eq=False)
class Unit:
    """One layer under one rule: its rows in a sweep, and where its result grows.

    Attributes:
        rule: The rule.
        span: Rows of the layer among the rows of all layers and rules.
        settled: Settled weights or codes, in the layer's own order of columns.
        kept: True where a weight is kept; None if nothing is pruned.
    """

    rule: Rule
    span: slice
    settled: Tensor
    kept: Bool[Tensor, "out in"] | None

    @classmethod
    def empty(
        cls, rule: Rule, span: slice, columns: int, *, final: torch.dtype, masks: bool
    ) -> Self:
        """Make room for a result of type ``final``, with a mask if it needs one."""
        shape = span.stop - span.start, columns
        kept = torch.empty(shape, dtype=torch.bool) if masks else None
        return cls(rule, span, torch.empty(shape, dtype=final), kept)
