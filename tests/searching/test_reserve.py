import pytest

from autoprune.policy import Policy
from autoprune.search_config import SearchConfig
from autoprune.searching.clock import Clock, FastClock, Timetable
from autoprune.searching.reserve import MARGIN, Reserve, window_s
from autoprune.searching.rows import Trial

WINDOWS = {"statistics": 32, "fitness": 4, "choice": 8, "report": 16}


def trial(number, seconds, windows, put=0.0):
    return Trial(
        number,
        "complete",
        "test",
        Policy({}),
        {},
        0,
        "",
        "",
        timings={"evaluate_s": seconds, "propose_s": 99.0, "put_s": put},
        windows=(1.0,) * windows,
    )


def estimate(seconds, *, refine="mix", export=True, clock=None):
    search = SearchConfig(trials=1, refine=refine, finalists=4)
    table = Timetable(clock or Clock(), None, 0.0, dict(seconds))
    trials = [trial(0, 4.0, 4)]  # a second a window
    return Reserve.estimate(search, WINDOWS, 3, table, trials, export=export)


def test_window_costs_what_the_last_trials_say():
    slow = [trial(n, 100.0, 4) for n in range(30)]
    quick = [trial(30 + n, 2.0, 4) for n in range(20)]
    assert window_s(slow + quick, 50.0, 4) == 0.5
    assert window_s([trial(0, 2.0, 4), trial(1, 9.0, 0)], None, 4) == 0.5


def test_window_costs_what_the_dense_model_says_before_the_first_trial():
    assert window_s([], 6.0, 4) == 0.75
    assert window_s([], None, 4) == 0.0


def test_first_trial_that_reads_a_cold_disk_does_not_take_the_time_of_all():
    """It put variants on for 400 s, and was measured in one second a window."""
    search = SearchConfig(trials=1, finalists=4)
    rows = [trial(0, 4.0, 4, put=400.0), *(trial(n, 4.0, 4, put=2.0) for n in (1, 2))]
    for known, put in ((rows[:1], 0.0), (rows, 2.0)):
        table = Timetable(Clock(), None, 0.0, {})
        found = Reserve.estimate(search, WINDOWS, 3, table, known, export=True)
        assert found.rank == pytest.approx(MARGIN * ((4 + 5 + 1.5) * 8 + 9 * put))
        assert found.solve == pytest.approx(MARGIN * (2 * 32 + 8))


def test_parts_by_hand():
    found = estimate({"variants": 60.0, "preflight": 5.0})
    assert found.rank == pytest.approx(MARGIN * (4 + 5 + 1.5) * 8)
    assert found.solve == pytest.approx(MARGIN * (2 * 32 + 60 / 3 + 8))
    assert found.mix == pytest.approx(MARGIN * (4 * 4 + 8))
    assert found.report == pytest.approx(MARGIN * (5 + 1.5) * 16)
    assert found.export == pytest.approx(MARGIN * (5 + 12 + 2 * 16))
    whole = found.rank + 2 * (found.solve + found.mix) + found.report + found.export
    assert found.total == pytest.approx(whole)
    assert found.closing == found.report + found.export


@pytest.mark.parametrize(("refine", "zero"), [("solve", 1), ("none", 2)])
def test_what_is_not_asked_for_takes_no_time(refine, zero):
    found = estimate({}, refine=refine, export=False)
    assert [found.solve, found.mix].count(0.0) == zero
    assert found.export == 0.0


def test_fresh_process_takes_real_seconds_by_any_clock():
    quick = estimate({}, clock=FastClock(100.0))
    assert quick.export == pytest.approx(MARGIN * (2 * 1200 + 2 * 16))


def test_only_rivals_that_there_are_take_time():
    few = Reserve.estimate(
        SearchConfig(trials=1, finalists=4),
        WINDOWS,
        3,
        Timetable(Clock(), None, 0.0, {}),
        [trial(0, 4.0, 4)],
        rivals=1,
        export=False,
    )
    assert few.rank == pytest.approx(MARGIN * (4 + 1 + 1.5) * 8)
    assert few.report == pytest.approx(MARGIN * (1 + 1.5) * 16)


def test_it_says_what_is_kept_for_what():
    told = str(Reserve(rank=10, solve=20, mix=5, report=7, export=30))
    assert told == (
        "97 s: 10 for the last choice, 50 for refining, 7 for the report, "
        "30 for the export"
    )
