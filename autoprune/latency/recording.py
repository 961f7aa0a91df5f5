"""Records the profile of a device: the points of a plan, until a deadline.

Points come in the order in which they matter, and every one is on disk as soon as it is
timed: what a deadline or a crash leaves is a profile that knows less.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from time import perf_counter

import torch

from autoprune.errors import ProfileError
from autoprune.latency.facts import cache_bytes, device_facts, software_facts, state
from autoprune.latency.journal import Journal, key_of
from autoprune.latency.kernels import KERNELS
from autoprune.latency.operations import calls_for
from autoprune.latency.profiles import Point
from autoprune.latency.running import (
    Product,
    activations,
    algorithms_of,
    calls_of,
    choose,
    copies_for,
    generator_on,
    missing,
    products,
)
from autoprune.latency.timing import CudaTimer, Timer, Timing

REPEATED = {"cuda": 30, "cpu": 10_000}
"""Points that are timed once more at the end, to see drift. On a CPU that is all of
them: a neighbour's load comes for minutes and goes, and the faster time counts."""

REPEAT_SHARE = {"cuda": 0.02, "cpu": 0.5}
"""Share of the time of kernels that is kept for them."""

BEST = 3
"""Algorithms that are timed in full, the best of a quick look at all."""

OK = "ok"

Tell = Callable[[str], None]
"""Takes lines for people."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A time at which work stops.

    Attributes:
        end: By ``perf_counter``.
    """

    end: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """Make the deadline so many seconds from now."""
        return cls(perf_counter() + seconds)

    def left(self) -> float:
        """Give the seconds left; negative when it is over."""
        return self.end - perf_counter()


class Recorder:
    """Times points of a kind of device into a journal.

    Args:
        kind: ``cuda`` or ``cpu``.
        journal: Where points go, and what is done already.
        timer: Takes the times.
        tell: Is told of progress.
        seed: Of all chance.
    """

    def __init__(
        self,
        kind: str,
        journal: Journal,
        *,
        timer: Timer,
        tell: Tell = lambda _: None,
        seed: int = 0,
    ) -> None:
        self.kind, self.journal, self.timer, self._tell = kind, journal, timer, tell
        self._cache = cache_bytes(device_facts(kind))
        self._generator = generator_on(kind, seed)
        self._order = 1 + max((p.order for p in journal.points.values()), default=0)

    def run(self, plan: Sequence[Point], deadline: Deadline) -> bool:
        """Time what a plan has that is not done yet.

        Args:
            plan: Points in order; those in a row with the same weight share it.
            deadline: No point is begun after it.

        Returns:
            True if all points are done.
        """
        todo = [point for point in plan if not self.journal.done(point)]
        for (op, name, n, k), points in groupby(todo, key=_weight_of):
            if deadline.left() <= 0:
                return False
            group = [point for point in points if self._tried(point)]
            if not group:
                continue
            if op == "gemm" and (why := missing(KERNELS[name])) is not None:
                for point in group:
                    self._keep(point, None, f"missing: {why}")
                continue
            self._tell(f"{op} {name} {n} x {k}" if op == "gemm" else f"{op} {name}")
            if not self._time_group(group, deadline):
                return False
        return True

    def repeat(self, plan: Sequence[Point], deadline: Deadline) -> None:
        """Time some points once more, spread over the plan: what changed is drift."""
        done = self.journal.points
        known = [
            found
            for point in plan
            if (found := done.get(key_of(point))) is not None and found.ok
        ]
        chosen = known[:: max(1, len(known) // REPEATED[self.kind])]
        for _, points in groupby(chosen[: REPEATED[self.kind]], key=_weight_of):
            for point, timing, _ in self._timings(list(points)):
                if isinstance(timing, Timing):
                    self.journal.again(point, timing.us)
                if deadline.left() <= 0:
                    return

    def _tried(self, point: Point) -> bool:
        """Give a point up that took its process down; note the start of another."""
        if not self.journal.given_up(point):
            return True
        self._keep(point, None, "the process died while it was timed, twice")
        return False

    def _time_group(self, group: Sequence[Point], deadline: Deadline) -> bool:
        try:
            for point, timing, algorithm in self._timings(group):
                if isinstance(timing, Timing):
                    self._keep(replace(point, algorithm=algorithm), timing, OK)
                else:
                    self._keep(point, None, timing)
                if deadline.left() <= 0 and point is not group[-1]:
                    return False
        finally:
            _free(self.kind)
        return True

    def _timings(
        self, group: Sequence[Point]
    ) -> Iterator[tuple[Point, Timing | str, int]]:
        """Time points that share weights; what fails comes with the reason.

        Raises:
            RuntimeError: If the device is lost: nothing after it can be believed.
        """
        made: list[Product] | str | None = None
        for point in group:
            self.journal.begin(point)
            try:
                if point.op != "gemm":
                    yield point, self._of_operation(point), -1
                    continue
                if made is None:
                    made = self._products(point)
                if isinstance(made, str):
                    yield point, made, -1
                    continue
                kernel = KERNELS[point.kernel]
                x = activations(kernel, point.m, point.k, self._generator)
                yield point, *self._of_products(made, x)
            except (RuntimeError, NotImplementedError, ProfileError) as error:
                self._still_there(error)
                yield point, _reason(error), -1

    def _products(self, point: Point) -> list[Product] | str:
        """Pack weights; give the reason if it cannot be done, for all points alike."""
        kernel = KERNELS[point.kernel]
        copies = copies_for(kernel, point.n, point.k, self._cache)
        try:
            return products(kernel, point.n, point.k, copies, self._generator)
        except (RuntimeError, NotImplementedError, ProfileError) as error:
            self._still_there(error)
            return _reason(error)

    def _of_products(
        self, made: Sequence[Product], x: torch.Tensor
    ) -> tuple[Timing, int]:
        """Time products, and where they can choose, those of the best algorithm."""
        calls = calls_of(made, x)
        with torch.inference_mode():
            numbers = algorithms_of(made, x)
            if not numbers:
                return self.timer.time(calls), -1
            looks = []
            for number in numbers:
                choose(made, number)
                looks.append((self.timer.time(calls, quick=True).us, number))
            best = []
            for _, number in sorted(looks)[:BEST]:
                choose(made, number)
                best.append((self.timer.time(calls), number))
        return min(best, key=lambda pair: pair[0].us)

    def _of_operation(self, point: Point) -> Timing:
        calls = calls_for(point, self._generator, self._cache)
        if point.kernel == "launch.eager" and isinstance(self.timer, CudaTimer):
            return self.timer.eager(calls)
        return self.timer.time(calls)

    def _keep(self, point: Point, timing: Timing | None, status: str) -> None:
        found = replace(point, order=self._order, status=status)
        if timing is not None:
            found = replace(timed(found, timing), note=timing.why)
        self._order += 1
        self.journal.add(found)

    def _still_there(self, error: BaseException) -> None:
        """Let an error pass if the device works still.

        Raises:
            RuntimeError: If it does not: some errors of a GPU stay until the process
                ends. The next one goes on behind this point.
        """
        if self.kind == "cpu":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise RuntimeError(f"the GPU is lost, after: {error}") from lost


def timed(point: Point, timing: Timing) -> Point:
    """Give a point with the times that were taken."""
    return replace(
        point,
        us=timing.us,
        us_min=timing.us_min,
        us_p90=timing.us_p90,
        repeats=timing.repeats,
    )


def _weight_of(point: Point) -> tuple[str, str, int, int]:
    return point.op, point.kernel, point.n, point.k


def _reason(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text[:300]


def _free(kind: str) -> None:
    """Give memory back between weights: every graph had a pool of its own."""
    if kind == "cuda":
        gc.collect(0)
        torch.cuda.empty_cache()


def about(kind: str) -> dict[str, object]:
    """Tell what recordings into one journal must have in common."""
    device = device_facts(kind)
    software = software_facts()
    return {
        "kind": kind,
        "device": device["name"],
        "torch": software["torch"],
        "cusparselt": software["cusparselt"],
    }


def tell_state(kind: str, journal: Journal, when: str) -> None:
    """Keep how the machine is."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    journal.tell_state({"when": when, "at": now, **state(kind)})
