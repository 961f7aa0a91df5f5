import pytest
from toy_clocks import Stopped

from autoprune.searching.ends import Ends


def reason(begun=3, mean_s=10.0, waiting=False, **ends):
    return Ends(**ends).reason(begun, mean_s, waiting=waiting)


def test_nothing_ends_a_search_by_itself():
    assert reason() is None


def test_enough_trials_end_it_once_none_waits():
    assert reason(trials=3) == "trials"
    assert reason(trials=4) is None
    assert reason(trials=3, waiting=True) is None


@pytest.mark.parametrize(("deadline", "ended"), [(109.9, "time"), (110.0, None)])
def test_trial_that_would_overrun_is_not_begun(deadline, ended):
    assert reason(deadline=deadline, clock=Stopped()) == ended


def test_full_disk_and_being_told_end_it():
    assert reason(room=lambda: False) == "disk"
    assert reason(stop=lambda: True, room=lambda: False) == "stopped"
    assert reason(trials=3, stop=lambda: True) == "trials"
