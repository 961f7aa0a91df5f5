"""Where microseconds come from: what a source has to tell, and the profile as one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import log2

from autoprune.latency.estimate import Term, Tier
from autoprune.latency.kernels import KERNELS, Kernel
from autoprune.latency.profiles import FIT, Profile
from autoprune.latency.shape import Attention
from autoprune.latency.table import Found, Sample, Table

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""Types as the names of kernels end in them."""


class Source(ABC):
    """Knows the microseconds of single operations on one device."""

    name: str

    @abstractmethod
    def has(self, kernel: Kernel) -> bool:
        """Tell whether anything is known of a kernel."""

    @abstractmethod
    def gemm(self, kernel: Kernel, m: int, n: int, k: int) -> Term:
        """Time ``[m, k] @ [k, n]`` on a kernel that it has."""

    @abstractmethod
    def attention(
        self, shape: Attention, batch: int, new: int, context: int, dtype: str
    ) -> Term | None:
        """Time one attention; None if nothing is known."""

    @abstractmethod
    def rest(self, hidden: int, tokens: int) -> Term | None:
        """Time what a block does beside products and attention; None if unknown."""

    @abstractmethod
    def launch(self, execution: str) -> Term | None:
        """Time the start of one kernel from the host; None if it costs nothing."""


@dataclass(frozen=True, slots=True)
class Line:
    """What a block does beside products and attention: a line over tokens.

    Attributes:
        per_block: Microseconds whatever the tokens.
        per_number: Microseconds for each token and number of the hidden state.
        own: Error of one prediction.
        shared: Error that all have in common.
    """

    per_block: float
    per_number: float
    own: float = 0.1
    shared: float = 0.1


class Measured(Source):
    """A profile of the device itself.

    Args:
        profile: The profile.
        rest: What whole models told of all else; None if none were recorded.
        held_out: Also leave the held-out points out of the tables, to test them.
    """

    def __init__(
        self, profile: Profile, rest: Line | None = None, *, held_out: bool = False
    ) -> None:
        self.profile, self.name = profile, str(profile.device["name"])
        self._line, self._split = rest, FIT if held_out else None

    @cached_property
    def tables(self) -> dict[str, Table]:
        """The table of every kernel."""
        samples: dict[str, list[Sample]] = {}
        for point in self.profile.of("gemm", split=self._split):
            kernel = KERNELS.get(point.kernel)
            if kernel is None:  # recorded by a later AutoPrune
                continue
            shape = (point.m, point.n, point.k)
            sample = Sample(
                point.m,
                (log2(point.n), log2(point.k)),
                kernel.flop(*shape),
                kernel.moved(*shape),
                point.us,
            )
            samples.setdefault(kernel.name, []).append(sample)
        return {name: Table(own) for name, own in samples.items()}

    @cached_property
    def _attentions(self) -> dict[tuple[str, str], Table]:
        """The tables of attention, by operation and type."""
        types = {short: dtype for dtype, short in SHORT.items()}
        found: dict[tuple[str, str], list[Sample]] = {}
        for op in ("attn_prefill", "attn_decode"):
            for point in self.profile.of(op, split=self._split):
                shape = Attention(point.heads, point.kv_heads, point.head_dim)
                new = point.m // point.batch
                dtype = types[point.kernel.rpartition(".")[2]]
                sample = Sample(
                    point.context,
                    _place(shape, point.batch),
                    *attended(shape, point.batch, new, point.context, dtype),
                    point.us,
                )
                found.setdefault((op, dtype), []).append(sample)
        return {key: Table(samples) for key, samples in found.items()}

    def has(self, kernel: Kernel) -> bool:
        """Tell whether it was recorded."""
        return kernel.name in self.tables

    def gemm(self, kernel: Kernel, m: int, n: int, k: int) -> Term:
        """Look a product up."""
        rows = m if (m, n, k) in self._recorded[kernel.name] else kernel.padded(m)
        place = (log2(n), log2(k))
        flop, moved = kernel.flop(m, n, k), kernel.moved(m, n, k)
        found = self.tables[kernel.name].find(rows, place, flop, moved)
        return time_of("linears", kernel.name, (m, n, k), found)

    def attention(
        self, shape: Attention, batch: int, new: int, context: int, dtype: str
    ) -> Term | None:
        """Look an attention up."""
        op = "attn_decode" if new == 1 else "attn_prefill"
        table = self._attentions.get((op, dtype))
        if table is None:
            return None
        flop, moved = attended(shape, batch, new, context, dtype)
        found = table.find(context, _place(shape, batch), flop, moved)
        sizes = (batch, new, context, shape.heads, shape.kv_heads)
        return time_of("attention", f"{op}.{SHORT[dtype]}", sizes, found)

    def rest(self, hidden: int, tokens: int) -> Term | None:
        """Read it off the line."""
        if self._line is None:
            return None
        line = self._line
        us = line.per_block + line.per_number * hidden * tokens
        tier = Tier.TABLE_INTERPOLATED
        return Term("rest", "rest", (hidden, tokens), us, line.own, line.shared, tier)

    def launch(self, execution: str) -> Term | None:
        """Look the start of a kernel up; a processor's own starts are in the rest."""
        if self.profile.kind == "cpu":
            return None
        for point in self.profile.of("launch"):
            if point.kernel.endswith(execution):
                tier = Tier.TABLE_EXACT
                return Term("launch", execution, (), point.us, 0.1, 0.1, tier)
        return None

    @cached_property
    def _recorded(self) -> dict[str, set[tuple[int, int, int]]]:
        found: dict[str, set[tuple[int, int, int]]] = {}
        for point in self.profile.of("gemm", split=self._split):
            found.setdefault(point.kernel, set()).add((point.m, point.n, point.k))
        return found


def time_of(part: str, kernel: str, shape: tuple[int, ...], found: Found) -> Term:
    """Make a term of what was found."""
    return Term(part, kernel, shape, found.us, found.own, found.shared, found.tier)


def attended(
    shape: Attention, batch: int, new: int, context: int, dtype: str
) -> tuple[float, float]:
    """Count operations and bytes of an attention in which no token sees later ones."""
    item = 4 if dtype == "float32" else 2
    pairs = new * (context - new) + new * (new + 1) / 2
    flop = 4.0 * batch * shape.heads * shape.head_dim * pairs
    rows = 2 * new * shape.heads + 2 * context * shape.kv_heads
    return flop, float(batch * rows * shape.head_dim * item)


def _place(shape: Attention, batch: int) -> tuple[float, ...]:
    """Tell attentions apart, most of all by how much runs side by side."""
    sizes = (batch * shape.heads, shape.heads // shape.kv_heads, shape.head_dim)
    return tuple(log2(size) for size in sizes)
