"""What a person sees on the terminal while something runs."""

import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from autoprune.reporting.observer import SEARCHING, Observer
from autoprune.reporting.tables import duration, value

PLAIN_EVERY_S = 30.0
"""Where nothing can be drawn, as in a file: seconds between two lines of progress."""

PACKAGES = ("autoprune", "autoprune_plugins")
"""Whose log messages a person sees; what other libraries log is theirs."""


class ConsoleObserver(Observer):
    """Draws progress, with an estimate of the time left.

    A stage leaves one line behind, so that a log tells what took how long. Use it as a
    context manager, or nothing is drawn.

    Args:
        console: Where to: standard error, as results go to standard output.
        budget_s: The run's time budget in seconds, counted from now; None for none.
    """

    def __init__(self, console: Console, *, budget_s: float | None = None) -> None:
        self.console = console
        self.current: str | None = None
        self._deadline = None if budget_s is None else time.monotonic() + budget_s
        self._goals: Sequence[tuple[str, str]] = ()
        self._best: Any = None
        self._began = self._told = time.monotonic()
        self._done, self._total = 0, None  # type: int, int | None
        self._first: tuple[float, int] | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "ConsoleObserver":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._finish("" if kind is None else "not finished")
        self._progress.stop()

    def stage(self, name: str) -> None:
        """End the stage before with a line, and begin another."""
        self._finish()
        self.current = name
        self._began = self._told = time.monotonic()
        self._done, self._total, self._first = 0, None, None
        self._task = self._progress.add_task(name, total=None, text="")

    def advance(self, done: int, total: int | None) -> None:
        """Move the bar; where there is none, write a line from time to time."""
        now = time.monotonic()
        self._done, self._total = done, total
        self._first = self._first or (now, done)
        left = self.left_s()
        parts = [f"{done}" if total is None else f"{done}/{total}"]
        parts += [] if left is None else [f"{duration(left)} left"]
        parts += [self._best_text()] if self._best_text() else []
        text = ", ".join(parts)
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, text=text)
        if self._progress.disable and now - self._told >= PLAIN_EVERY_S:
            self._told = now
            self._print(f"  {self.current}: {text}")

    def left_s(self) -> float | None:
        """Estimate the seconds left of the stage; None where nobody can know.

        By the pace of the stage so far, or by the budget where that ends earlier.
        """
        now, ends = time.monotonic(), []
        if self._first and self._total and self._done > self._first[1]:
            pace = (now - self._first[0]) / (self._done - self._first[1])
            ends.append(pace * (self._total - self._done))
        if self.current == SEARCHING and self._deadline is not None:
            ends.append(max(0.0, self._deadline - now))
        return min(ends, default=None)

    def aim(self, goals: Sequence[tuple[str, str]], trials: Sequence[Any] = ()) -> None:
        """Remember what is wanted, to tell which trial is the best."""
        self._goals = goals
        for row in trials:
            self._compare(row)

    def trial(self, row: Any) -> None:
        """Keep the trial if it is the best so far."""
        self._compare(row)
        if row.error:
            self.note(f"trial {row.number} failed: {row.error}")

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._print(f"  {text}")

    def _compare(self, row: Any) -> None:
        if len(self._goals) != 1 or not row.feasible:
            return  # of several metrics no one trial is the best
        sign = 1 if self._goals[0][1] == "minimize" else -1
        if self._best is None or sign * row.values[0] < sign * self._best.values[0]:
            self._best = row

    def _best_text(self) -> str:
        if self._best is None or self.current != SEARCHING:
            return ""
        name = self._goals[0][0]
        return f"{name} {value(name, self._best.values[0])} (trial {self._best.number})"

    def _finish(self, how: str = "") -> None:
        """Leave a line on the stage that ends."""
        if self.current is None:
            return
        took = duration(time.monotonic() - self._began)
        best = self._best_text()
        parts = [f"{self.current}: {took}", best and f"best {best}", how]
        self._print(", ".join(part for part in parts if part))
        self.current = None
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    """Writes log messages to a console, above the bar that is drawn there."""

    def __init__(self, console: Console, *, verbose: bool) -> None:
        super().__init__(logging.DEBUG if verbose else logging.WARNING)
        self._console = console
        self._verbose = verbose

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message, with a traceback only for those who want it."""
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1]:
            error = record.exc_info[1]
            lines = traceback.format_exception(error)
            text += f"\n{''.join(lines)}" if self._verbose else f": {error}"
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(
            text, style=style, markup=False, highlight=False, soft_wrap=True
        )


@contextmanager
def logging_to(console: Console, *, verbose: bool) -> Iterator[None]:
    """Show AutoPrune's warnings on a console, and all its messages if ``verbose``.

    Without that, what other libraries warn of is silenced.
    """
    handler, silent = _ConsoleHandler(console, verbose=verbose), logging.NullHandler()
    loggers = [logging.getLogger(name) for name in PACKAGES]
    levels = [logger.level for logger in loggers]
    root = logging.getLogger()
    # Python writes to standard error what finds no handler at all.
    root.addHandler(handler if verbose else silent)
    for logger in loggers:
        logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
        if not verbose:
            logger.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeHandler(silent)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeHandler(handler)
