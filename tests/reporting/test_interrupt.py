import os
import signal

import pytest

from autoprune.reporting.interrupt import Interrupt
from autoprune.reporting.observer import SEARCHING


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_waits_for_the_trial_and_the_second_does_not() -> None:
    told: list[str] = []
    with Interrupt(lambda: SEARCHING, told.append).listening() as stop:
        assert not stop()
        press()
        assert stop()
        assert told == ["finishing the running trial; Ctrl-C again stops at once"]
        with pytest.raises(KeyboardInterrupt):
            press()


def test_other_stages_end_at_once() -> None:
    told: list[str] = []
    with Interrupt(lambda: "making variants", told.append).listening() as stop:
        with pytest.raises(KeyboardInterrupt):
            press()
        assert not stop()
    assert told == []


def test_the_handler_of_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(lambda: None, lambda text: None).listening() as stop:
        assert signal.getsignal(signal.SIGINT) == stop.hear
    assert signal.getsignal(signal.SIGINT) is before
