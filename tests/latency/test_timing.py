"""Timers against calls whose time is known."""

import random
import time

import pytest
import torch

from autoprune.latency.comparing import bootstrap_median, compare
from autoprune.latency.timing import (
    CpuTimer,
    Timing,
    count_of,
    one_thread,
    rotation,
)


class Busy:
    """Keeps the processor busy for so many microseconds of its own time."""

    def __init__(self, us: float) -> None:
        self.us, self.calls = us, 0

    def __call__(self) -> None:
        self.calls += 1
        end = time.thread_time() + self.us * 1e-6
        while time.thread_time() < end:
            pass


def test_the_summary_of_timings() -> None:
    found = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0], "thread")
    assert (found.us, found.us_min, found.us_p90, found.repeats) == (3.0, 1.0, 5.0, 5)
    ten = Timing.of([float(i) for i in range(1, 11)], "graph")
    assert (ten.us, ten.us_p90) == (5.5, 9.0)


def test_counts_fill_the_wanted_time() -> None:
    assert count_of(10.0, 2000.0) == 200
    assert count_of(3.0, 10.0) == 4
    assert count_of(1e6, 2000.0) == 1
    assert count_of(1e-9, 2000.0) == 2000


def test_calls_take_turns() -> None:
    seen: list[int] = []
    turn = rotation([lambda i=i: seen.append(i) for i in range(3)])  # type: ignore
    for _ in range(7):
        next(turn)()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_busy_calls_take_their_time_and_waiting_is_free() -> None:
    timer = CpuTimer(batch_ms=4.0, batches=3)
    busy = timer.time([Busy(500.0)])
    assert busy.us == pytest.approx(500, rel=0.2)
    assert busy.us_min <= busy.us <= busy.us_p90
    assert busy.repeats == 3 and busy.way == "thread"
    waiting = CpuTimer(batch_ms=0.1, batches=2).time([lambda: time.sleep(0.005)])
    assert waiting.us < 2500


def test_every_copy_is_called() -> None:
    copies = [Busy(50.0) for _ in range(4)]
    CpuTimer(batch_ms=1.0, batches=2).time(copies)
    calls = [copy.calls for copy in copies]
    assert min(calls) >= 5 and max(calls) - min(calls) <= 1


def test_a_quick_look_takes_two_batches() -> None:
    assert (
        CpuTimer(batch_ms=1.0, batches=5).time([Busy(100.0)], quick=True).repeats == 2
    )


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_twice_the_work_is_told_as_twice_the_time() -> None:
    candidates = {"dense": Busy(400.0), "twice": Busy(800.0), "half": Busy(200.0)}
    found = compare(candidates, double=Busy(400.0), rounds=5, batch_ms=2.0)
    assert found.rounds == 5 and not found.noisy
    assert found.a_a == pytest.approx(1, abs=0.05)
    assert found.found["dense"].ratio == 1.0
    for name, ratio in (("twice", 2.0), ("half", 0.5)):
        one = found.found[name]
        assert one.ratio == pytest.approx(ratio, rel=0.1)
        assert one.low <= one.ratio <= one.high
        assert one.timing.us == pytest.approx(ratio * 400, rel=0.2)


def test_a_double_that_differs_is_told_after_as_many_rounds_again() -> None:
    found = compare({"dense": Busy(200.0)}, double=Busy(300.0), rounds=3, batch_ms=1.0)
    assert found.noisy and found.rounds == 6
    assert found.a_a == pytest.approx(1.5, rel=0.1)


def test_rounds_end_when_time_is_up_but_three_are_run() -> None:
    found = compare(
        {"dense": Busy(100.0)}, double=Busy(100.0), rounds=50, batch_ms=0.1, seconds=0
    )
    assert found.rounds == 3


def test_the_bootstrap_interval_of_a_median() -> None:
    assert bootstrap_median([2.0] * 5, random.Random(0)) == (2.0, 2.0)
    low, high = bootstrap_median([1.0, 2.0, 3.0, 4.0, 100.0], random.Random(0))
    assert low <= 2.0 and high >= 4.0
    # Resampling five values, the median is the largest only if three draws hit it:
    # 5.8 %, so 2.5 % of either tail reaches the ends.
    assert (low, high) == (1.0, 100.0)


@pytest.mark.gpu
def test_a_graph_is_replayed_and_told_apart_from_eager() -> None:
    from autoprune.latency.timing import CudaTimer

    a = torch.randn(2048, 2048, device="cuda")
    timer = CudaTimer()
    found = timer.time([lambda: a @ a])
    assert found.way == "graph" and found.repeats == 7
    host = timer.time([lambda: float((a @ a).sum())])  # reads a number on the host
    assert host.way == "eager" and "not captured" in host.why
    assert host.us > found.us
    one = torch.zeros(1, device="cuda")
    assert (
        timer.eager([lambda: one.add_(1.0)]).us > timer.time([lambda: one.add_(1.0)]).us
    )
