"""Takes the time of calls: on a GPU by graphs and events, on a CPU by one thread's own.

Every call of a list does the same on weights of its own, so that these come from memory
and not from a cache; the timers go round the list.
"""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from time import perf_counter, thread_time
from typing import Any

import torch

Call = Callable[[], Any]

MOST_CALLS = 2000
"""Calls that one graph or batch holds at most."""

QUICKER = 5.0
"""How many times shorter a quick look's replays are."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        us: The median.
        us_min: The fastest.
        us_p90: Nine of ten are as fast.
        repeats: Timings taken, each of many calls.
        way: How: ``graph``, ``eager`` or ``thread``.
        why: Why it was not ``graph`` on a GPU; empty otherwise.
    """

    us: float
    us_min: float
    us_p90: float
    repeats: int
    way: str
    why: str = ""

    @classmethod
    def of(cls, times: Sequence[float], way: str, why: str = "") -> "Timing":
        """Sum up the microseconds of several timings."""
        ordered = sorted(times)
        p90 = ordered[min(len(ordered) - 1, ceil(0.9 * len(ordered)) - 1)]
        median = statistics.median(ordered)
        return cls(median, ordered[0], p90, len(ordered), way, why)


class Timer(ABC):
    """Takes times on one kind of device."""

    @abstractmethod
    def time(self, calls: Sequence[Call], *, quick: bool = False) -> Timing:
        """Time a call.

        Args:
            calls: The same, each on weights of its own.
            quick: Take few timings: enough to choose among algorithms.
        """

    @abstractmethod
    def method(self) -> dict[str, Any]:
        """Tell how times are taken, for the header of a profile."""


class CpuTimer(Timer):
    """Times on one thread, by the time that the thread itself ran.

    Wall time and several threads tell, on a busy machine, of its other load.

    Args:
        batch_ms: A batch of calls takes at least as long.
        batches: Batches timed.
    """

    def __init__(self, *, batch_ms: float = 20.0, batches: int = 5) -> None:
        self._batch_us, self._batches = batch_ms * 1e3, batches

    def time(self, calls: Sequence[Call], *, quick: bool = False) -> Timing:
        """Time a call in batches; all calls run once before."""
        with one_thread():
            turn = rotation(calls)
            first = _ran(turn, 1)
            # Two more at most tell how many a batch takes, and warm up.
            few = count_of(first, self._batch_us / 4)
            count = count_of(_ran(turn, few), self._batch_us)
            batches = 2 if quick else self._batches
            return Timing.of([_ran(turn, count) for _ in range(batches)], "thread")

    def method(self) -> dict[str, Any]:
        """Tell how times are taken."""
        return {
            "timer": "time.thread_time of one thread",
            "batch_us": self._batch_us,
            "batches": self._batches,
            "threads": 1,
        }


class CudaTimer(Timer):
    """Times replays of a captured graph of many calls, by events around each.

    What cannot be captured is timed call by call, and the timing says so: there, small
    kernels wait for the host.

    Args:
        replay_ms: A replay takes at least as long.
        warmups: Replays that do not count.
        replays: Replays that do.
    """

    def __init__(
        self, *, replay_ms: float = 2.0, warmups: int = 3, replays: int = 7
    ) -> None:
        self._replay_us, self._warmups, self._replays = (
            replay_ms * 1e3,
            warmups,
            replays,
        )
        self._stream = torch.cuda.Stream()

    def time(self, calls: Sequence[Call], *, quick: bool = False) -> Timing:
        """Time a call in a graph, or else eagerly."""
        turn = rotation(calls)
        rounds = 2 if quick else self._replays
        # On the stream of the capture: libraries set up what they need on it now.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._events(turn, 1, 1)
            wanted = self._replay_us / QUICKER if quick else self._replay_us
            count = count_of(min(self._events(turn, 2, 2)), wanted)
            try:
                if quick:
                    graph = self._capture(turn, count)
                    self._replay(graph, count, 1)
                    return Timing.of(self._replay(graph, count, rounds), "graph")
                return self._of_graph(turn, count, rounds)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                torch.cuda.synchronize()  # an error that stays is raised again here
                why = f"not captured: {_first_line(error)}"
                return Timing.of(self._events(turn, count, rounds), "eager", why)

    def eager(self, calls: Sequence[Call], count: int = 1000) -> Timing:
        """Time calls one by one, the host's part included, by the clock."""
        turn = rotation(calls)
        times = []
        for _ in range(self._warmups + self._replays):
            torch.cuda.synchronize()
            start = perf_counter()
            for _ in range(count):
                next(turn)()
            torch.cuda.synchronize()
            times.append((perf_counter() - start) * 1e6 / count)
        return Timing.of(times[self._warmups :], "eager")

    def method(self) -> dict[str, Any]:
        """Tell how times are taken."""
        return {
            "timer": "CUDA events around graph replays",
            "replay_us": self._replay_us,
            "warmups": self._warmups,
            "replays": self._replays,
        }

    def _of_graph(self, turn: Iterator[Call], count: int, rounds: int) -> Timing:
        graph = self._capture(turn, count)
        times = self._replay(graph, count, 2)
        if times[-1] * count < self._replay_us / 2 and count < MOST_CALLS:
            # The host held the first guess up: one call is faster than it looked.
            count = count_of(times[-1], self._replay_us)
            graph = self._capture(turn, count)
        self._replay(graph, count, self._warmups)
        return Timing.of(self._replay(graph, count, rounds), "graph")

    def _capture(self, turn: Iterator[Call], count: int) -> "torch.cuda.CUDAGraph":
        """Capture calls. Not by ``torch.cuda.graph``: that frees all memory first."""
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(count):
                next(turn)()
        except BaseException:
            try:
                graph.capture_end()
            except RuntimeError:
                pass  # what broke the capture is what counts
            raise
        graph.capture_end()
        return graph

    def _replay(
        self, graph: "torch.cuda.CUDAGraph", count: int, rounds: int
    ) -> list[float]:
        return [us / count for us in self._spans([graph.replay] * rounds)]

    def _events(self, turn: Iterator[Call], count: int, rounds: int) -> list[float]:
        def several() -> None:
            for _ in range(count):
                next(turn)()

        return [us / count for us in self._spans([several] * rounds)]

    def _spans(self, calls: Sequence[Call]) -> list[float]:
        """Give the microseconds between events around each call."""
        marks = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in calls
        ]
        for call, (start, end) in zip(calls, marks, strict=True):
            start.record()
            call()
            end.record()
        self._stream.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in marks]


def timer_for(device: str) -> Timer:
    """Make the timer of a kind of device: ``cuda`` or ``cpu``."""
    return CudaTimer() if device == "cuda" else CpuTimer()


def count_of(one_us: float, wanted_us: float) -> int:
    """Say how many calls take as long as wanted: at least 1, at most ``MOST_CALLS``.

    Example:
        >>> count_of(30.0, 100.0), count_of(500.0, 100.0), count_of(0.0, 100.0)
        (4, 1, 2000)
    """
    if one_us <= 0:
        return MOST_CALLS
    return max(1, min(MOST_CALLS, ceil(wanted_us / one_us)))


def rotation(calls: Sequence[Call]) -> Iterator[Call]:
    """Go round and round a list: of two calls in a row none has the same weights."""
    while True:
        yield from calls


class one_thread:  # noqa: N801 - reads as a statement
    """Lets torch compute on one thread inside of a block."""

    def __enter__(self) -> None:
        """Set one thread."""
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        """Set what was before."""
        torch.set_num_threads(self._threads)


def _ran(turn: Iterator[Call], count: int) -> float:
    """Run calls; give the microseconds of each."""
    start = thread_time()
    for _ in range(count):
        next(turn)()
    return (thread_time() - start) * 1e6 / count


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
