import io
import logging
import time
from dataclasses import dataclass, field

import pytest
from rich.console import Console

from autoprune.reporting import console as module
from autoprune.reporting.console import ConsoleObserver, logging_to
from autoprune.reporting.observer import SEARCHING


@dataclass(frozen=True)
class Row:
    number: int
    values: tuple[float, ...]
    feasible: bool = True
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def paper(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_stage_leaves_one_line() -> None:
    console = paper()
    with ConsoleObserver(console) as observer:
        observer.stage("making variants")
        observer.advance(1, 2)
        observer.stage("measuring")
    first, second = text_of(console).splitlines()
    assert first.startswith("making variants: ")
    assert first.endswith("s")
    assert second.startswith("measuring: ")


def test_a_stage_that_breaks_says_so() -> None:
    console = paper()
    with pytest.raises(KeyError), ConsoleObserver(console) as observer:
        observer.stage("searching")
        raise KeyError("x")
    assert text_of(console).endswith("not finished\n")


@pytest.mark.parametrize(("way", "best"), [("minimize", 1), ("maximize", 2)])
def test_the_best_trial_is_told(way: str, best: int) -> None:
    console = paper()
    with ConsoleObserver(console) as observer:
        observer.aim([("kl", way)])
        observer.stage(SEARCHING)
        for number, value in enumerate((0.5, 0.25, 0.75)):
            observer.trial(Row(number, (value,)))
    told = {1: "best kl 0.2500 (trial 1)", 2: "best kl 0.7500 (trial 2)"}
    assert told[best] in text_of(console)


def test_the_best_trial_may_be_of_before() -> None:
    console = paper()
    with ConsoleObserver(console) as observer:
        observer.aim([("kl", "minimize")], [Row(0, (0.125,))])
        observer.stage(SEARCHING)
        observer.trial(Row(1, (0.5,)))
    assert "best kl 0.1250 (trial 0)" in text_of(console)


@pytest.mark.parametrize(
    ("goals", "row"),
    [
        ([("kl", "minimize")], Row(0, (0.5,), feasible=False)),
        ([("kl", "minimize"), ("size_bytes", "minimize")], Row(0, (0.5, 9.0))),
    ],
    ids=["over a limit", "several goals"],
)
def test_no_trial_is_called_the_best(goals: list[tuple[str, str]], row: Row) -> None:
    console = paper()
    with ConsoleObserver(console) as observer:
        observer.aim(goals)
        observer.stage(SEARCHING)
        observer.trial(row)
    assert "best" not in text_of(console)


def test_a_failed_trial_is_told() -> None:
    console = paper()
    with ConsoleObserver(console) as observer:
        observer.aim([("kl", "minimize")])
        observer.trial(Row(7, (), feasible=False, error="MethodError: [no] way"))
    assert "trial 7 failed: MethodError: [no] way" in text_of(console)


def test_the_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    observer = ConsoleObserver(paper())
    observer.stage(SEARCHING)
    assert observer.left_s() is None
    now = 110.0
    observer.advance(51, 150)  # a run that goes on: the first 50 were before
    assert observer.left_s() is None
    now = 114.0
    observer.advance(53, 150)
    assert observer.left_s() == pytest.approx(2.0 * 97)


def test_the_time_left_ends_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    observer = ConsoleObserver(paper(), budget_s=60)
    observer.stage("making variants")
    assert observer.left_s() is None
    observer.stage(SEARCHING)
    now = 120.0
    assert observer.left_s() == pytest.approx(40)
    observer.advance(0, 100)
    now = 121.0
    observer.advance(50, 100)  # the pace needs one second more, the budget 39
    assert observer.left_s() == pytest.approx(1)
    now = 200.0
    assert observer.left_s() == 0


def test_a_log_gets_a_line_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    console = paper()
    with ConsoleObserver(console) as observer:
        observer.stage("making variants")
        observer.advance(0, 30)
        now = 110.0
        observer.advance(5, 30)
        assert text_of(console) == ""
        now = 131.0
        observer.advance(10, 30)
        assert text_of(console) == "  making variants: 10/30, 1 min 02 s left\n"


def test_a_terminal_gets_a_bar() -> None:
    console = paper(terminal=True)
    with ConsoleObserver(console) as observer:
        observer.aim([("kl", "minimize")])
        observer.stage(SEARCHING)
        observer.trial(Row(0, (0.5,)))
        observer.advance(1, 3)
        time.sleep(0.2)  # the bar is drawn ten times a second
    assert "1/3, kl 0.5000 (trial 0)" in text_of(console)


def test_warnings_are_shown_without_their_traceback() -> None:
    console = paper()
    with logging_to(console, verbose=False):
        log = logging.getLogger("autoprune.models.text")
        try:
            raise ValueError("[bad] value")
        except ValueError:
            log.exception("plugin %r failed", "mine")
        log.info("nobody asked")
        logging.getLogger("somebody.else").warning("not ours")
    assert text_of(console) == "error: plugin 'mine' failed: [bad] value\n"


def test_verbose_tells_everything() -> None:
    console = paper()
    with logging_to(console, verbose=True):
        log = logging.getLogger("autoprune.models.text")
        try:
            raise ValueError("bad")
        except ValueError:
            log.exception("failed")
        log.info("asked")
        logging.getLogger("somebody.else").warning("theirs")
    text = text_of(console)
    assert "Traceback" in text
    assert "info: asked" in text
    assert text.count("asked") == 1
    assert "warning: theirs" in text


def test_loggers_are_left_as_they_were() -> None:
    loggers = [logging.getLogger(name) for name in (None, "autoprune")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    with logging_to(paper(), verbose=True):
        assert loggers[1].level == logging.DEBUG
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before
