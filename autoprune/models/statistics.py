"""What is known of a layer's inputs, gathered from tokens as they stream by."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

STATISTICS = frozenset(
    {"hessian", "input_abs_mean", "input_max", "input_norm", "input_rows", "input_sum"}
)
"""What a method may need."""


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Sums over the tokens that one input has seen, in float32.

    Attributes:
        tokens: Number of tokens.
        square_sum: Sum of the squares of each input, that is the squared L2 norm of
            each column of ``X`` ``[tokens, in]``; None if not gathered.
        hessian: ``Xᵀ X``, not averaged and not doubled; None if not gathered.
        abs_sum: Sum of the sizes of each input; None if not gathered.
        abs_max: Largest size of each input; None if not gathered.
        input_sum: Sum of each input; None if not gathered.
        input_rows: What some tokens gave, evenly spread over all; None if not gathered.
    """

    tokens: int
    square_sum: Float[Tensor, " in"] | None = None
    hessian: Float[Tensor, "in in"] | None = None
    abs_sum: Float[Tensor, " in"] | None = None
    abs_max: Float[Tensor, " in"] | None = None
    input_sum: Float[Tensor, " in"] | None = None
    input_rows: Float[Tensor, "rows in"] | None = None


NO_STATISTICS = InputStatistics(0)
"""For methods that need none."""


_STRIPS = 4
"""Most strips of a Hessian: four save 3/8 of its products, and half of the time."""

_STRIP = 192
"""Fewest rows of a strip; below, the products grow slower than they shrink."""

MOST_ROWS = 512
"""Most tokens whose activations are kept as they came: 29 MB at 14336 inputs."""


class Gathering:
    """Adds up statistics of one input, batch by batch.

    Args:
        needs: Names out of ``STATISTICS``.
        width: Number of inputs.
    """

    def __init__(self, needs: Collection[str], width: int) -> None:
        self.needs = needs
        self.tokens = 0
        self.square_sum = torch.zeros(width) if "input_norm" in needs else None
        self.hessian = torch.zeros(width, width) if "hessian" in needs else None
        self.abs_sum = torch.zeros(width) if "input_abs_mean" in needs else None
        self.abs_max = torch.zeros(width) if "input_max" in needs else None
        self.input_sum = torch.zeros(width) if "input_sum" in needs else None
        self.input_rows = torch.zeros(0, width) if "input_rows" in needs else None
        self._stride = 1  # of the tokens in ``input_rows``

    def add(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Add the activations of some tokens, in any float type."""
        self.tokens += inputs.shape[0]
        full = inputs.float()
        if self.square_sum is not None:
            self.square_sum += full.square().sum(0)
        if self.input_sum is not None:
            self.input_sum += full.sum(0)
        if self.abs_sum is not None:
            self.abs_sum += full.abs().sum(0)
        if self.abs_max is not None and len(full):
            self.abs_max = torch.maximum(self.abs_max, full.abs().amax(0))
        if self.input_rows is not None:
            first = -(self.tokens - len(full)) % self._stride
            rows = torch.cat([self.input_rows, full[first :: self._stride]])
            while len(rows) > MOST_ROWS:  # half as many, twice as far from each other
                rows, self._stride = rows[::2], 2 * self._stride
            self.input_rows = rows
        if self.hessian is not None:
            with exact_products(inputs):
                self._add_products(full)

    def result(self) -> InputStatistics:
        """Give the sums so far: the gathering's own, good until more is added."""
        if self.hessian is not None:
            _mirror(self.hessian)
        return InputStatistics(
            self.tokens,
            self.square_sum,
            self.hessian,
            abs_sum=self.abs_sum,
            abs_max=self.abs_max,
            input_sum=self.input_sum,
            input_rows=self.input_rows,
        )

    def _add_products(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Add to the upper half of the Hessian, strip by strip; the rest repeats it."""
        assert self.hessian is not None
        for rows in _strips(inputs.shape[1]):
            ahead = inputs[:, rows.start :]
            self.hessian[rows, rows.start :] += inputs[:, rows].T @ ahead


def _strips(width: int) -> list[slice]:
    step = max(_STRIP, ceil(width / _STRIPS))
    return [slice(start, start + step) for start in range(0, width, step)]


def _mirror(hessian: Float[Tensor, "in in"]) -> None:
    """Repeat the upper half of a Hessian below, in place: of it there is no copy."""
    for rows in _strips(len(hessian)):
        square = hessian[rows, rows]
        square.copy_(square.triu() + square.triu(1).T)
        hessian[rows, : rows.start] = hessian[: rows.start, rows].T


def exact_products(source: Tensor) -> AbstractContextManager[None]:
    """Multiply float32 copies as fast as is exact for what they were copied from.

    Numbers that came as bfloat16 lose nothing in bfloat16 units, whose products are
    exact and whose sums are float32: several times faster than float32 units.
    """
    bf16 = source.dtype == torch.bfloat16
    return matmul_precision("bf16" if bf16 else "ieee")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let float32 matrix products on the CPU round their factors, for a while.

    Args:
        precision: ``bf16`` rounds the factors to bfloat16, sums stay in float32;
            ``ieee`` rounds nothing.
    """
    backend: Any = torch.backends.mkldnn  # its type stubs lack ``matmul``
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = precision
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before
