"""Predicts what a compressed model takes: operation by operation, and how sure it is.

Microseconds come from the first source that knows: the device's own profile, another
device's carried over by the ceilings of both, the data sheet. A product is timed by the
kernel of its format; where there is none, by that of the next simpler one, with a
warning.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil

from autoprune.errors import ProfileError
from autoprune.latency.estimate import Estimate, Ratio, Term, Tier, compare
from autoprune.latency.kernels import KERNELS, Kernel, multiplied_as, simpler
from autoprune.latency.shape import DENSE, Attention, Linear, ModelShape
from autoprune.latency.sources import Source
from autoprune.latency.workload import Workload

LAUNCHES = 20
"""Kernels that a block launches where nothing captures them, about."""


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a workload takes.

    Attributes:
        workload: The workload.
        prefill: Of the whole batch of prompts.
        decode: Of one step at the mean context: one token for every sequence.
    """

    workload: Workload
    prefill: Estimate
    decode: Estimate

    @cached_property
    def total(self) -> Estimate:
        """The prefill and all steps after it."""
        steps = self.workload.output - 1
        return Estimate.sum([(self.prefill, 1.0), (self.decode, float(steps))])

    def over(self, other: "Forecast") -> Ratio:
        """Divide the whole time by another's."""
        return compare(self.total, other.total)


@dataclass(frozen=True, eq=False)
class Predictor:
    """Predicts times on one device.

    Attributes:
        source: What is known of the device.
    """

    source: Source
    _known: dict[tuple[str, int, int, int, str], Term] = field(default_factory=dict)

    def forecast(self, shape: ModelShape, workload: Workload) -> Forecast:
        """Predict what a workload takes.

        Raises:
            ProfileError: If nothing tells the time of a dense product in its type.
        """

        def step(new: int, context: int) -> Estimate:
            return self.step(
                shape,
                workload.batch,
                new,
                context,
                dtype=workload.dtype,
                execution=workload.execution,
            )

        contexts = workload.decode_contexts
        decode = Estimate.sum([(step(1, at), 1 / len(contexts)) for at in contexts])
        return Forecast(workload, step(workload.prompt, workload.prompt), decode)

    def linear(self, linear: Linear, tokens: int, dtype: str) -> Term:
        """Predict one product: that of the fastest kernel for its format."""
        rows = max(1, round(tokens * linear.uses))
        key = (linear.format, rows, linear.n, linear.k, dtype)
        if key not in self._known:
            self._known[key] = self._fastest(*key)
        return self._known[key]

    def attention(
        self, shape: Attention, batch: int, new: int, context: int, dtype: str
    ) -> Term:
        """Predict one attention: ``new`` queries a sequence, ``context`` keys."""
        found = self.source.attention(shape, batch, new, context, dtype)
        return found or _untold("attention", self.source)

    def elementwise(
        self, what: str, width: int, tokens: int, dtype: str
    ) -> Term | None:
        """Predict what goes number by number; None where it is part of the rest."""
        return self.source.elementwise(what, width, tokens, dtype)

    def rest(self, hidden: int, tokens: int) -> Term:
        """Predict all else in one block: the cache, copies, what the host adds."""
        return self.source.rest(hidden, tokens) or _untold("rest", self.source)

    def step(
        self,
        shape: ModelShape,
        batch: int,
        new: int,
        context: int,
        *,
        dtype: str,
        execution: str = "graph",
    ) -> Estimate:
        """Predict one pass of the model.

        Args:
            shape: The model.
            batch: Sequences.
            new: Tokens of each that go through.
            context: Tokens of each that are attended to, the new ones included.
            dtype: Of activations.
            execution: ``graph`` or ``eager``.
        """
        terms: dict[Term, float] = defaultdict(float)
        rest = self.rest(shape.hidden, batch * new)
        for block in shape.blocks:
            for linear in block.linears:
                terms[self.linear(linear, batch * new, dtype)] += 1
            if block.attention is not None:
                one = self.attention(block.attention, batch, new, context, dtype)
                terms[one] += 1
            for what, width in block.elementwise(shape.hidden):
                found = self.elementwise(what, width, batch * new, dtype)
                if found is not None:
                    terms[found] += 1
            terms[rest] += block.parts
        if shape.head is not None:
            head = self.linear(shape.head, batch, dtype)
            terms[replace(head, part="head")] += 1
        return self._started(Estimate(dict(terms)), shape, execution)

    def _started(self, ran: Estimate, shape: ModelShape, execution: str) -> Estimate:
        """Add what the host takes beyond the device: one start, or those of all."""
        launch = self.source.launch(execution)
        if launch is None:
            return ran
        count = 1.0
        if execution == "eager":
            starts = LAUNCHES * sum(block.parts for block in shape.blocks)
            count = max(0.0, starts - ran.ms * 1e3 / launch.us)
        return Estimate(dict(ran.terms) | {launch: count})

    def _fastest(self, form: str, m: int, n: int, k: int, dtype: str) -> Term:
        names = multiplied_as(form)
        known: dict[str, Term] = {}
        for kernel in self._kernels(dtype):
            if kernel.format in names and kernel.takes(n, k):
                term = self.source.gemm(kernel, m, n, k)
                other = known.setdefault(kernel.format, term)
                known[kernel.format] = min(term, other, key=lambda one: one.us)
        if form in known:
            least = min(known, key=lambda name: known[name].us)
            told = f"{form} gains nothing at {n} x {k}, {m} tokens: timed as {least}"
            return known[form] if least == form else _warned(known[least], told)
        plainer = simpler(form)
        if plainer is None:
            return self._padded(m, n, k, dtype)
        told = f"no kernel for {form} at {n} x {k} in {dtype}: timed as {plainer}"
        plain = self.linear(Linear("", n, k, plainer), m, dtype)
        return _warned(plain, told)

    def _padded(self, m: int, n: int, k: int, dtype: str) -> Term:
        """Time a dense product whose sides have to be padded first."""
        for kernel in self._kernels(dtype):
            if kernel.format == DENSE:
                up = [
                    ceil(x / of) * of for x, of in ((n, kernel.n_of), (k, kernel.k_of))
                ]
                term = self.source.gemm(kernel, m, *up)
                return _warned(term, f"{n} x {k} is padded to {up[0]} x {up[1]}")
        raise ProfileError(
            f"nothing tells the time of a product in {dtype} on {self.source.name}. "
            "Choose another dtype for the workload, or record with `autoprune profile`"
        )

    def _kernels(self, dtype: str) -> list[Kernel]:
        return [k for k in KERNELS.values() if k.dtype == dtype and self.source.has(k)]


def _warned(term: Term, warning: str) -> Term:
    return replace(term, warnings=(*term.warnings, warning))


def _untold(part: str, source: Source) -> Term:
    """Stand for what nothing tells the time of: nothing, and a warning."""
    told = f"nothing is known of the {part} on {source.name}: it is left out"
    return Term(part, part, (), 0.0, 0.0, 0.0, Tier.ROOFLINE_CALIBRATED, (told,))
