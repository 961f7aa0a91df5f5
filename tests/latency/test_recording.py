"""Recordings: their order, their end, and going on after a crash."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latency.tiny_recordings import CountingTimer, tiny_order
from torch import Tensor

from autoprune.errors import ProfileError
from autoprune.latency import recording, running
from autoprune.latency.journal import FILE, Journal, key_of
from autoprune.latency.plan import gemms
from autoprune.latency.profiles import Point, Profile
from autoprune.latency.quality import quality_of
from autoprune.latency.record import record
from autoprune.latency.recording import Deadline, Recorder


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few copies of a weight be enough."""
    monkeypatch.setattr(recording, "cache_bytes", lambda _: 20e3)


def a_point(m: int = 4, kernel: str = "cpu.linear.fp32", **sizes: int) -> Point:
    return Point("gemm", kernel, 0.0, m=m, n=sizes.get("n", 16), k=sizes.get("k", 8))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "a.work", {"device": "this"}, resume=False)


def lines(folder: Path) -> list[dict[str, object]]:
    text = (folder / FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_points_are_timed_in_the_order_of_the_plan(tmp_path: Path) -> None:
    order = tiny_order(tmp_path)
    found = record(order, timer=CountingTimer())
    plan = order.kernel_points()
    assert found.complete and found.points == len(plan) and found.profile is None
    journal = Journal(found.work, recording.about("cpu"), resume=True)
    timed = sorted(journal.points.values(), key=lambda point: point.order)
    assert [key_of(point) for point in timed] == [key_of(point) for point in plan]
    assert all(p.ok and 0 < p.us_min <= p.us <= p.us_p90 for p in timed)
    assert len(journal.repeats) >= 10
    assert {state["when"] for state in journal.states} == {"before", "after"}


def test_the_deadline_is_kept_and_leaves_what_matters_most(tmp_path: Path) -> None:
    order = tiny_order(tmp_path, probe=False, seconds=1.5)
    start = time.perf_counter()
    found = record(order, timer=CountingTimer())
    assert time.perf_counter() - start < 6
    plan = order.kernel_points()
    assert not found.complete and 0 < found.points < len(plan)
    journal = Journal(found.work, recording.about("cpu"), resume=True)
    assert journal.points.keys() == {key_of(p) for p in plan[: found.points]}


def test_going_on_times_nothing_again(tmp_path: Path) -> None:
    first = CountingTimer()
    order = tiny_order(tmp_path)
    record(order, timer=first)
    before = (tmp_path / "tiny.work" / FILE).read_text().splitlines()
    second = CountingTimer()
    record(replace(order, resume=True), timer=second)
    # Only the repeats at the end, which tell of drift, are taken anew.
    repeats = sum("again" in line for line in before)
    assert second.taken == repeats < first.taken
    after = (tmp_path / "tiny.work" / FILE).read_text().splitlines()
    assert after[: len(before)] == before


def test_a_recording_that_was_begun_is_not_overwritten(tmp_path: Path) -> None:
    record(tiny_order(tmp_path), timer=CountingTimer())
    with pytest.raises(ProfileError, match=r"begun in .*tiny\.work.*--resume"):
        record(tiny_order(tmp_path), timer=CountingTimer())


def test_a_profile_is_written_of_what_there_is_and_never_changed(
    tmp_path: Path,
) -> None:
    order = tiny_order(tmp_path, seconds=0.7, probe=False)
    record(order, timer=CountingTimer())
    found = record(replace(order, part="finish"))
    assert found.profile == tmp_path / "tiny"
    profile = Profile.read(found.profile)
    assert not profile.complete and len(profile.points) == found.points > 0
    assert profile.kind == "cpu" and profile.device["caches"]
    assert profile.software["torch"] == torch.__version__
    assert profile.method["threads"] == 1 and profile.method["seconds"] > 0
    assert profile.quality["timed"] == found.points
    again = record(replace(order, part="finish"))
    assert again.profile == tmp_path / "tiny__2"


SCRIPT = """
import sys
from pathlib import Path
from latency.tiny_recordings import CountingTimer, tiny_order
from autoprune.latency import recording
from autoprune.latency.record import record

recording.cache_bytes = lambda _: 20e3
record(tiny_order(Path(sys.argv[1]), probe=False), timer=CountingTimer())
"""


def test_a_killed_recording_goes_on(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": tests},
    )
    file = tmp_path / "tiny.work" / FILE
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if file.exists() and file.read_text().count('"point"') >= 20:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with file.open("a") as torn:
        torn.write('{"point": {"op": "gem')  # a line that was cut off
    before = Journal(tmp_path / "tiny.work", recording.about("cpu"), resume=True)
    assert len(before.points) >= 20
    order = tiny_order(tmp_path, probe=False, resume=True, seconds=1.0)
    found = record(order, timer=CountingTimer())
    after = Journal(found.work, recording.about("cpu"), resume=True)
    assert after.points.items() > before.points.items()
    plan = order.kernel_points()
    assert after.points.keys() == {key_of(p) for p in plan[: found.points]}
    profile = record(replace(order, part="finish")).profile
    assert profile is not None
    assert len(Profile.read(profile).points) == len(after.points)


def test_a_point_that_kills_the_process_twice_is_given_up(journal: Journal) -> None:
    bad, good = a_point(1), a_point(2)
    timer = CountingTimer()
    for _ in range(2):
        journal.begin(bad)
    Recorder("cpu", journal, timer=timer).run([bad, good], Deadline.after(60))
    points = journal.points
    assert "died while it was timed" in points[key_of(bad)].status
    assert points[key_of(good)].ok and timer.taken == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_kernel_that_cannot_be_had_becomes_a_row(journal: Journal) -> None:
    plan = gemms("torch.int_mm", [(64, 64)], (1, 32))
    plan += gemms("cslt.24.bf16", [(64, 64)], (8,))
    assert Recorder("cpu", journal, timer=CountingTimer()).run(plan, Deadline.after(60))
    for point in plan:
        found = journal.points[key_of(point)]
        assert not found.ok and found.us == 0
        assert found.status == "missing: torch sees no CUDA device"


def test_a_shape_that_fails_becomes_a_row_and_the_next_is_timed(
    journal: Journal,
) -> None:
    odd = a_point(kernel="cpu.int4pack_mm.g64", n=24, k=64)
    unknown = Point("conjure", "spell", 0.0, m=1)
    good = a_point()
    Recorder("cpu", journal, timer=CountingTimer()).run(
        [odd, unknown, good], Deadline.after(60)
    )
    assert "multiples of 16" in journal.points[key_of(odd)].status
    assert "'conjure'" in journal.points[key_of(unknown)].status
    assert journal.points[key_of(good)].ok


class Chooser:
    """A product with three algorithms, of which the second is the fastest."""

    def __init__(self) -> None:
        self.algorithm = 0
        self._weight = torch.randn(64, 64)

    def algorithms(self, x: Tensor) -> list[int]:
        return [0, 1, 2]

    def __call__(self, x: Tensor) -> Tensor:
        for _ in range((40, 1, 20)[self.algorithm]):
            found = x @ self._weight
        return found


def test_the_fastest_algorithm_is_chosen(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "products", lambda *_: [Chooser(), Chooser()])
    point = a_point(8, n=64, k=64)
    Recorder("cpu", journal, timer=CountingTimer()).run([point], Deadline.after(60))
    found = journal.points[key_of(point)]
    assert found.algorithm == 1
    assert running.algorithms_of([torch.relu], torch.ones(1)) == []


def test_a_journal_of_another_machine_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, {"device": "one"}, resume=False)
    with pytest.raises(ProfileError, match="'one'.*'two'"):
        Journal(tmp_path, {"device": "two"}, resume=True)


def test_a_journal_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("no JSON\n")
    with pytest.raises(ProfileError, match=r"cannot read .*points\.jsonl"):
        Journal(tmp_path, {}, resume=True)


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    first = Journal(tmp_path, {}, resume=False)
    first.add(a_point(1))
    whole = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(whole + '{"point"')
    second = Journal(tmp_path, {}, resume=True)
    second.add(a_point(2))
    assert [line for line in lines(tmp_path) if "point" in line][1]["point"]
    assert len(second.points) == 2


def test_quality_tells_spread_drift_and_what_failed() -> None:
    points = [
        replace(a_point(m), us=10.0, us_p90=10.0 + m, us_min=9.0) for m in (1, 2, 3)
    ]
    failed = replace(a_point(9), status="out of memory")
    repeats = {key_of(p): us for p, us in zip(points, (11.0, 11.0, 22.0), strict=True)}
    found = quality_of([*points, failed], repeats)
    assert found["timed"] == 3 and found["repeated"] == 3
    assert found["failed"] == {"cpu.linear.fp32: out of memory": 1}
    assert found["spread_p50"] == pytest.approx(0.2)
    assert found["spread_p95"] == pytest.approx(0.3)
    assert found["drift"] == pytest.approx(0.1)
    assert quality_of([], {})["drift"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "tpu"}, "cuda, cpu, found 'tpu'"),
        ({"part": "some"}, "found 'some'"),
        ({"seconds": 0.0}, "found 0 s"),
    ],
)
def test_orders_that_make_no_sense(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ProfileError, match=said):
        tiny_order(tmp_path, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no CUDA device here.*--device cpu"):
        record(tiny_order(tmp_path, kind="cuda"))


def test_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no recording .* was begun in"):
        record(tiny_order(tmp_path, name=None, resume=True))
