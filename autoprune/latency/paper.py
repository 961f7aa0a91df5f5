"""Times on a device that was not measured: by data sheet, or by another's profile."""

from collections.abc import Sequence
from dataclasses import replace
from math import hypot

from autoprune.latency.devices import Datasheet
from autoprune.latency.estimate import Term, Tier
from autoprune.latency.kernels import Kernel
from autoprune.latency.roofline import Roof
from autoprune.latency.shape import Attention
from autoprune.latency.sources import (
    SHORT,
    Measured,
    Source,
    attended,
    passed,
    time_of,
)
from autoprune.latency.table import Found

PAPER_SHARE, PAPER_OVERHEAD_US = 0.8, 3.0
"""What a product reaches of a data sheet's ceilings, and what every call takes."""

PAPER_ERRORS = {"bf16": (0.15, 0.2), "fp16": (0.15, 0.2), "fp32": (0.2, 0.3)}
PAPER_OTHERS = (0.25, 0.5)
"""Own and shared error of a time from a data sheet. Eight bits swing with the shape."""

SPARSE_GAIN = 1.6
"""How much more a sparse kernel computes in practice; on paper it is twice as much."""

CARRIED_ERRORS = (0.1, 0.15)
"""Own and shared error that carrying a time to another device adds at least."""

REST_KERNELS = 4
"""Kernels of a block beside all that is named: the cache, copies, masks."""

LAUNCH_US = {"graph": 1.5, "eager": 6.0}
"""Microseconds of a kernel's start, where nothing was measured."""


class Paper(Source):
    """A data sheet.

    Args:
        sheet: The data sheet.
    """

    def __init__(self, sheet: Datasheet) -> None:
        self.sheet, self.name = sheet, sheet.name

    def has(self, kernel: Kernel) -> bool:
        """Tell whether the kernel exists for the device, by its compute capability."""
        return (
            kernel.device == "cuda"
            and kernel.math in self.sheet.tera
            and kernel.runs_on(self.sheet.capability)
        )

    def roof(self, kernel: Kernel) -> Roof:
        """Give the roofline of a kernel on paper."""
        tera = self.sheet.tera[kernel.math] * (SPARSE_GAIN if kernel.sparse else 1.0)
        return Roof(
            tera * 1e6 * PAPER_SHARE,
            self.sheet.gigabytes_s * 1e3 * PAPER_SHARE,
            PAPER_OVERHEAD_US,
        )

    def gemm(self, kernel: Kernel, m: int, n: int, k: int) -> Term:
        """Read a product off the roofline."""
        us = self.roof(kernel).us(kernel.flop(m, n, k), kernel.moved(m, n, k))
        plain = not kernel.sparse and kernel.weight_bytes >= 2
        own, shared = PAPER_ERRORS[kernel.math] if plain else PAPER_OTHERS
        found = Found(us, own, shared, Tier.ROOFLINE_DATASHEET)
        return time_of("linears", kernel.name, (m, n, k), found)

    def attention(
        self, shape: Attention, batch: int, new: int, context: int, dtype: str
    ) -> Term | None:
        """Read an attention off the roofline, at half of what products reach."""
        kernel = f"sdpa.{SHORT[dtype]}"
        flop, moved = attended(shape, batch, new, context, dtype)
        sheet = self.sheet
        roof = Roof(
            sheet.tera[SHORT[dtype]] * 1e6 * PAPER_SHARE / 2,
            sheet.gigabytes_s * 1e3 * PAPER_SHARE,
            2 * PAPER_OVERHEAD_US,
        )
        found = Found(roof.us(flop, moved), *PAPER_OTHERS, Tier.ROOFLINE_DATASHEET)
        sizes = (batch, new, context, shape.heads, shape.kv_heads)
        return time_of("attention", kernel, sizes, found)

    def elementwise(
        self, what: str, width: int, tokens: int, dtype: str
    ) -> Term | None:
        """Count the bytes, and the start of a kernel."""
        _, moved = passed(what, width, tokens, dtype)
        us = LAUNCH_US["graph"] + moved / (self.sheet.gigabytes_s * 1e3 * PAPER_SHARE)
        found = Found(us, *PAPER_OTHERS, Tier.ROOFLINE_DATASHEET)
        return time_of("elementwise", what, (tokens, width), found)

    def rest(self, hidden: int, tokens: int) -> Term | None:
        """Count the starts of a few kernels."""
        us = REST_KERNELS * LAUNCH_US["graph"]
        found = Found(us, *PAPER_OTHERS, Tier.ROOFLINE_DATASHEET)
        return time_of("rest", "rest", (), found)

    def launch(self, execution: str) -> Term | None:
        """Give what a start usually takes."""
        us, tier = LAUNCH_US[execution], Tier.ROOFLINE_DATASHEET
        return Term("launch", execution, (), us, *PAPER_OTHERS, tier)


class Carried(Source):
    """A profile of another device, scaled by what both reach on paper.

    How far a kernel stays above its roofline carries over well; the roofline does not.

    Args:
        measured: What was recorded elsewhere.
        origin: The data sheet of that device.
        sheet: That of the device in question.
    """

    def __init__(self, measured: Measured, origin: Datasheet, sheet: Datasheet) -> None:
        self._measured = measured
        self._from, self._to = Paper(origin), Paper(sheet)
        self.name = sheet.name

    def has(self, kernel: Kernel) -> bool:
        """Tell whether it was recorded there and exists here."""
        recorded = self._measured.has(kernel) and self._from.has(kernel)
        return recorded and self._to.has(kernel)

    def gemm(self, kernel: Kernel, m: int, n: int, k: int) -> Term:
        """Carry a product over."""
        there = self._measured.gemm(kernel, m, n, k)
        before, after = (one.gemm(kernel, m, n, k) for one in (self._from, self._to))
        carried = _scaled(there, before, after)
        assert carried is not None
        return carried

    def attention(
        self, shape: Attention, batch: int, new: int, context: int, dtype: str
    ) -> Term | None:
        """Carry an attention over."""
        there, before, after = (
            source.attention(shape, batch, new, context, dtype)
            for source in (self._measured, self._from, self._to)
        )
        return _scaled(there, before, after)

    def elementwise(
        self, what: str, width: int, tokens: int, dtype: str
    ) -> Term | None:
        """Carry it over."""
        there, before, after = (
            source.elementwise(what, width, tokens, dtype)
            for source in (self._measured, self._from, self._to)
        )
        return _scaled(there, before, after)

    def rest(self, hidden: int, tokens: int) -> Term | None:
        """Carry all else over."""
        there, before, after = (
            source.rest(hidden, tokens)
            for source in (self._measured, self._from, self._to)
        )
        return _scaled(there, before, after)

    def launch(self, execution: str) -> Term | None:
        """Take the start of a kernel as it was there: it is the host's."""
        return self._measured.launch(execution)


def _scaled(there: Term | None, before: Term | None, after: Term | None) -> Term | None:
    """Scale a time by how much faster the other device is on paper."""
    if there is None or before is None or after is None:
        return None
    own, shared = CARRIED_ERRORS
    return replace(
        there,
        us=there.us * after.us / before.us,
        own=hypot(there.own, own),
        shared=hypot(there.shared, shared),
        tier=max(there.tier, Tier.TABLE_TRANSFERRED),
    )


class Chain(Source):
    """Several sources: the first that knows an operation tells its time.

    Args:
        sources: The best first, at least one.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources, self.name = tuple(sources), sources[0].name

    def has(self, kernel: Kernel) -> bool:
        """Tell whether any of them knows a kernel."""
        return any(source.has(kernel) for source in self._sources)

    def gemm(self, kernel: Kernel, m: int, n: int, k: int) -> Term:
        """Ask the first that has the kernel."""
        source = next(source for source in self._sources if source.has(kernel))
        return source.gemm(kernel, m, n, k)

    def attention(
        self, shape: Attention, batch: int, new: int, context: int, dtype: str
    ) -> Term | None:
        """Ask one after the other."""
        asked = (s.attention(shape, batch, new, context, dtype) for s in self._sources)
        return next((term for term in asked if term is not None), None)

    def elementwise(
        self, what: str, width: int, tokens: int, dtype: str
    ) -> Term | None:
        """Ask the first that knows what a block does beside: they go together."""
        asked = (s.elementwise(what, width, tokens, dtype) for s in self._asked())
        return next((term for term in asked if term is not None), None)

    def _asked(self) -> list[Source]:
        """Leave out what stands behind a source that knows the rest of a block.

        That was learnt beside what the very source tells number by number, if anything:
        another's would count it twice.
        """
        found: list[Source] = []
        for source in self._sources:
            found.append(source)
            if source.rest(1, 1) is not None:
                break
        return found

    def rest(self, hidden: int, tokens: int) -> Term | None:
        """Ask one after the other."""
        asked = (source.rest(hidden, tokens) for source in self._sources)
        return next((term for term in asked if term is not None), None)

    def launch(self, execution: str) -> Term | None:
        """Ask one after the other."""
        asked = (source.launch(execution) for source in self._sources)
        return next((term for term in asked if term is not None), None)
