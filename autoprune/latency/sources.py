"""Where microseconds come from: what a source has to tell, and the profile as one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from math import hypot, log2

from autoprune.latency.estimate import Term, Tier
from autoprune.latency.kernels import KERNELS, Kernel
from autoprune.latency.profiles import FIT, Profile
from autoprune.latency.shape import Attention
from autoprune.latency.table import Found, Sample, Table

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""Types as the names of kernels end in them."""

TYPES = {short: dtype for dtype, short in SHORT.items()}

FEW_TOKENS = 16
"""So many tokens are bound by weights alone: in a model and by themselves."""

PASSES = {"rms_norm": 2, "rope": 3, "silu_mul": 3, "add": 3}
"""How often an operation that goes number by number reads or writes each."""


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
    def elementwise(
        self, what: str, width: int, tokens: int, dtype: str
    ) -> Term | None:
        """Time an operation that goes number by number; None if nothing is known."""

    @abstractmethod
    def rest(self, hidden: int, tokens: int) -> Term | None:
        """Time all else that a block does; None if unknown."""

    @abstractmethod
    def launch(self, execution: str) -> Term | None:
        """Time the start of one kernel from the host; None if it costs nothing."""


@dataclass(frozen=True, slots=True)
class InModels:
    """What operations take inside of whole models, beyond what they take alone.

    Attributes:
        per_block: Microseconds of a block that no operation accounts for: what the host
            adds, the cache, copies.
        slowdown: How many times as long operations on more than ``FEW_TOKENS`` take.
        error: Error of both, which all operations share.
    """

    per_block: float
    slowdown: float = 1.0
    error: float = 0.03


class Measured(Source):
    """A profile of the device itself.

    Args:
        profile: The profile.
        inside: What whole models told of operations in them; None if none were
            recorded, or to know what operations take alone.
        held_out: Also leave the held-out points out of the tables, to test them.
    """

    def __init__(
        self,
        profile: Profile,
        inside: InModels | None = None,
        *,
        held_out: bool = False,
    ) -> None:
        self.profile, self.name = profile, str(profile.device["name"])
        self._inside, self._split = inside, FIT if held_out else None

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
        found: dict[tuple[str, str], list[Sample]] = {}
        for op in ("attn_prefill", "attn_decode"):
            for point in self.profile.of(op, split=self._split):
                shape = Attention(point.heads, point.kv_heads, point.head_dim)
                new = point.m // point.batch
                dtype = TYPES[point.kernel.rpartition(".")[2]]
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
        return self._placed(time_of("linears", kernel.name, (m, n, k), found), m)

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
        term = time_of("attention", f"{op}.{SHORT[dtype]}", sizes, found)
        return self._placed(term, batch * new)

    @cached_property
    def _elementwise(self) -> dict[str, Table]:
        samples: dict[str, list[Sample]] = {}
        for point in self.profile.of("elementwise", split=self._split):
            what, _, short = point.kernel.partition(".")
            flop, moved = passed(what, point.n, point.m, TYPES[short])
            sample = Sample(point.m, (log2(point.n),), flop, moved, point.us)
            samples.setdefault(point.kernel, []).append(sample)
        return {name: Table(own) for name, own in samples.items()}

    def elementwise(
        self, what: str, width: int, tokens: int, dtype: str
    ) -> Term | None:
        """Look it up."""
        table = self._elementwise.get(f"{what}.{SHORT[dtype]}")
        if table is None:
            return None
        found = table.find(tokens, (log2(width),), *passed(what, width, tokens, dtype))
        name, sizes = f"{what}.{SHORT[dtype]}", (tokens, width)
        return self._placed(time_of("elementwise", name, sizes, found), tokens)

    def rest(self, hidden: int, tokens: int) -> Term | None:
        """Give what whole models told."""
        if self._inside is None:
            return None
        us, error = self._inside.per_block, 2 * self._inside.error
        return Term("rest", "rest", (), us, error, error, Tier.TABLE_INTERPOLATED)

    def _placed(self, term: Term, tokens: int) -> Term:
        """Give the time of an operation inside of a model."""
        if self._inside is None:
            return term
        slower = self._inside.slowdown if tokens > FEW_TOKENS else 1.0
        shared = hypot(term.shared, self._inside.error)
        return replace(term, us=term.us * slower, shared=shared)

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


def passed(what: str, width: int, tokens: int, dtype: str) -> tuple[float, float]:
    """Count numbers and bytes of an operation that goes number by number."""
    item = 4 if dtype == "float32" else 2
    return float(tokens * width), float(PASSES[what] * tokens * width * item)
