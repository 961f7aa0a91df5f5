from datetime import datetime
from pathlib import Path

import pytest
from toy_clocks import Stopped

from autoprune.errors import ConfigError
from autoprune.limits import parse_bytes, seconds_until
from autoprune.searching.clock import Clock, FastClock, Timetable

EVENING = datetime.fromisoformat("2026-11-28T23:30:00+01:00")


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        ("07:30", 8),
        ("23:45", 0.25),
        ("23:30", 24),  # just now: tomorrow's
        ("2026-11-30 23:30", 48),
        ("2026-11-28T23:30:00+00:00", 1),
    ],
)
def test_deadline_is_the_next_time_of_day_or_a_date(text, hours):
    assert seconds_until(text, EVENING) == hours * 3600


@pytest.mark.parametrize("text", ["25:00", "soon", "7h", "2026-13-01 07:30", ""])
def test_what_is_no_deadline_is_refused(text):
    with pytest.raises(ConfigError, match="a deadline is a time such as 07:30, or a"):
        seconds_until(text, EVENING)


def test_deadline_that_has_passed_is_refused():
    with pytest.raises(ConfigError, match=r"'2026-11-01 07:30' has passed: it is 20"):
        seconds_until("2026-11-01 07:30", EVENING)


@pytest.mark.parametrize("text", ["40%", "0.4x", "-1 GB", "0", "much"])
def test_what_is_no_amount_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match="expected bytes such as 16 GB or 800 MB"):
        parse_bytes(text)


def test_share_of_the_time_leaves_what_is_reserved():
    table = Timetable.start(Stopped(), 1000.0)
    assert table.end(0.5, reserved=200.0) == 100.0 + 400.0
    assert table.end(1.0, reserved=1200.0) == 100.0 - 200.0
    table.clock.at += 300.0
    assert table.left() == 700.0


def test_without_a_budget_there_is_time():
    table = Timetable.start(Stopped(), None)
    assert table.end(1.0, reserved=10.0) is None
    assert table.left() == float("inf")


def test_times_of_parts_are_kept_for_when_the_run_goes_on(tmp_path: Path):
    table = Timetable.start(Stopped(), None)
    for name, took in (("variants", 30.0), ("dense", 5.0)):
        with table.timing(name):
            table.clock.at += took
    table.keep(tmp_path)
    again = Timetable.start(Stopped(), None)
    with again.timing("dense"):
        again.clock.at += 7.0
    again.recall(tmp_path)
    assert again.seconds == {"variants": 30.0, "dense": 7.0}


@pytest.mark.parametrize("text", ["", "[1]", '{"dense": "long"}'])
def test_times_that_cannot_be_read_are_done_without(tmp_path: Path, text):
    (tmp_path / "timings.json").write_text(text)
    table = Timetable.start(Stopped(), None)
    table.recall(tmp_path)
    assert table.seconds == {}


def test_fast_clock_runs_faster():
    clock, real = FastClock(1000.0), Clock()
    start, began = clock.now(), real.now()
    while real.now() < began + 0.01:
        pass
    passed = (clock.now() - start) / (real.now() - began)
    assert 990 < passed < 1100
