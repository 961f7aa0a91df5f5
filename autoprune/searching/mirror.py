"""Shows a run in an Optuna storage while it goes on; the ledger stays the truth."""

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage

from autoprune.errors import RunError
from autoprune.searching.ledger import Ledger
from autoprune.searching.mirrored import (
    MirroredStudy,
    Open,
    let_go,
    shown,
    storage_of,
)
from autoprune.searching.objective import Objective

log = logging.getLogger(__name__)

MOST_SHARE = 0.1
"""Most of the time that copying may take while the run goes on: Optuna's storage pays
per parameter, a quarter of a second of a CPU for a trial of 300."""

FIRST_PAUSE_S = 1.0
"""Pause after a first failure; the next are twice as long each."""

LONGEST_PAUSE_S = 60.0

CLOSING_S = 30.0
"""How long the end of a run waits for the last copies."""

AT_ONCE = 20
"""Most rows that are read ahead."""


class Mirror:
    """Copies finished rows to a study of any Optuna storage, in a thread of its own.

    There is no queue: what is missing is what the ledger has and the study has not, by
    the number that every copy carries. So an outage of any length costs no memory,
    a resumed run doubles nothing, and whoever adds a row does not wait.

    A storage that fails is told once and tried again; it never stops the run.

    Args:
        storage: A URL as `storage_of` takes it, or what opens a storage.
        study_name: The name of the study there.
        objective: Names and directions of its values.
        distributions: Of the parameters that trials may have.
        folder: The folder of the run, or of the part of it, that is shown.

    Raises:
        RunError: If the URL is none.
    """

    def __init__(
        self,
        storage: str | Open,
        study_name: str,
        *,
        objective: Objective,
        distributions: Mapping[str, BaseDistribution],
        folder: Path,
    ) -> None:
        self._open = storage_of(storage) if isinstance(storage, str) else storage
        self._place = shown(storage) if isinstance(storage, str) else study_name
        self._name = study_name
        self._objective = objective
        self._distributions = distributions
        self._folder = folder
        self._ledger: Ledger | None = None
        self._storage: BaseStorage | None = None
        self._study: MirroredStudy | None = None
        self._news = threading.Event()
        self._closing = threading.Event()
        self._left = 0
        self._failed = self._refused = self._late = False
        self._thread = threading.Thread(
            target=self._work, name=f"mirror {study_name}", daemon=True
        )

    def start(self) -> Self:
        """Begin to copy, from what is missing."""
        self._news.set()
        self._thread.start()
        return self

    def update(self) -> None:
        """Hear that the ledger has a new row. Returns at once."""
        self._news.set()

    def close(self, timeout: float = CLOSING_S) -> None:
        """Copy what is missing, for so many seconds at most, and end."""
        if self._thread.ident is None:
            return  # never started
        self._closing.set()
        self._news.set()
        self._thread.join(timeout)
        self._late = True
        if self._thread.is_alive() or self._left:
            log.warning(
                "the mirror %s ends behind the run. It catches up when the run goes on",
                self._place,
            )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *reason: object) -> None:
        self.close()

    def _work(self) -> None:
        pause = FIRST_PAUSE_S
        try:
            while not self._refused:
                self._news.wait()
                self._news.clear()
                ending = self._closing.is_set()
                try:
                    self._copy_missing()
                    pause = FIRST_PAUSE_S
                except Exception as error:  # whatever a storage raises
                    self._fail(error)
                    self._closing.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                    self._news.set()
                if ending:
                    return
        finally:
            self._drop()
            if self._ledger is not None:
                self._ledger.close()

    def _copy_missing(self) -> None:
        """Copy all rows that the study lacks, one after the other."""
        if self._ledger is None:
            self._ledger = Ledger.read(self._folder)
        study = self._study or self._opened(self._ledger)
        while study is not None and not self._late:
            missing = sorted(set(self._ledger.numbers()) - study.copied)
            self._left = len(missing)
            if not missing:
                study.note()
                self._tell_back()
                return
            for trial in self._ledger.trials(missing[:AT_ONCE]):
                began = time.monotonic()
                study.copy(trial)
                self._left -= 1
                self._tell_back()
                took = time.monotonic() - began
                self._closing.wait(took / MOST_SHARE - took)

    def _opened(self, ledger: Ledger) -> MirroredStudy | None:
        self._storage = self._open()
        try:
            self._study = MirroredStudy(
                self._storage,
                self._name,
                run=ledger.identity,
                objective=self._objective,
                distributions=self._distributions,
            )
        except RunError as error:  # that of another run: time does not mend it
            log.warning(
                "%s is not mirrored to %s: %s", self._folder, self._place, error
            )
            self._refused = True
        return self._study

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            cause: BaseException = error
            while cause.__cause__ is not None:  # Optuna's own words hide it
                cause = cause.__cause__
            said = " ".join(str(cause).split()) or type(cause).__name__
            log.warning(
                "the mirror %s fails: %s. The run goes on; the mirror is tried again",
                self._place,
                said,
            )
        self._failed = True
        self._left = max(self._left, 1)
        self._drop()

    def _tell_back(self) -> None:
        if self._failed:
            log.warning("the mirror %s is back", self._place)
        self._failed = False

    def _drop(self) -> None:
        """Let go of the storage; it is opened anew."""
        if self._storage is not None:
            with suppress(Exception):
                let_go(self._storage)
        self._storage = self._study = None
