"""A study in an Optuna storage that shows the rows of a ledger, for dashboards."""

import logging
import math
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from autoprune.errors import RunError
from autoprune.searching.objective import Objective
from autoprune.searching.rows import Trial
from autoprune.searching.sqlite_file import APPLICATION

log = logging.getLogger(__name__)

STALE_S = 5
"""Seconds until the lock on a journal is taken from a process that holds it and writes
nothing: it was killed. Optuna's own choice is 30."""

JOURNAL = "journal:"
"""What a URL of a file of Optuna's journal begins with."""

NUMBER = "autoprune:number"
"""Attribute of a mirrored trial: its number in the ledger."""

RUN = "autoprune:run"
"""Attribute of the study: the run that it shows."""

COPIED = "autoprune:copied"
"""Attribute of the study: which trials stand in it, so that not all have to be read."""

NOTED_EVERY = 20
"""Trials after which that attribute is written."""

METRIC_NAMES = "study:metric_names"
"""System attribute of Optuna's; its own method for it warns that it is experimental."""

LEGACY_CONSTRAINTS = "constraints"
"""System attribute that optuna-dashboard reads: 0.21 does not know Optuna 5's."""

_STATES = {"failed": TrialState.FAIL, "pruned": TrialState.PRUNED}

Open = Callable[[], BaseStorage]
"""Opens a storage."""


class MirroredStudy:
    """The study, opened for writing; it is made where there is none.

    Args:
        storage: Where it is.
        name: Its name there.
        run: The run that it shows.
        objective: Names and directions of its values.
        distributions: Of the parameters that trials may have.

    Raises:
        RunError: If there is a study of that name that shows something else.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        *,
        run: str,
        objective: Objective,
        distributions: Mapping[str, BaseDistribution],
    ) -> None:
        self._storage = storage
        self._distributions = distributions
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=objective.directions,
            load_if_exists=True,
        )
        attrs = self._study.user_attrs
        self._id = storage.get_study_id_from_name(name)
        if not attrs and not self._has(0):
            names = [goal for goal, _ in objective.goals]
            storage.set_study_system_attr(self._id, METRIC_NAMES, names)
            self._study.set_user_attr(RUN, run)
        elif attrs.get(RUN) != run:
            raise RunError(
                f"the study {name!r} there shows another run; give the mirror another "
                "name, or delete that study"
            )
        noted = attrs.get(COPIED, {"count": 0, "numbers": []})
        self._count = int(noted["count"])
        self.copied = {
            n for first, last in noted["numbers"] for n in range(first, last)
        }
        self._find_the_rest()
        self._noted = self._count

    def copy(self, trial: Trial) -> None:
        """Add a finished trial, which is not there yet."""
        self._study.add_trial(_mirrored(trial, self._distributions))
        self._count += 1
        self.copied.add(trial.number)
        if self._count >= self._noted + NOTED_EVERY:
            self.note()

    def note(self) -> None:
        """Write which trials are there."""
        if self._count > self._noted:
            known = {"count": self._count, "numbers": _ranges(self.copied)}
            self._study.set_user_attr(COPIED, known)
            self._noted = self._count

    def _find_the_rest(self) -> None:
        """Read the trials that were added and not noted, as by a killed process."""
        while self._has(self._count):
            trial = self._storage.get_trial(self._trial_id(self._count))
            if NUMBER in trial.user_attrs:
                self.copied.add(int(trial.user_attrs[NUMBER]))
            self._count += 1

    def _has(self, position: int) -> bool:
        try:
            self._trial_id(position)
        except KeyError:
            return False
        return True

    def _trial_id(self, position: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, position)


def storage_of(place: str) -> Open:
    """Tell how a storage is opened, from its URL.

    Args:
        place: A URL of SQLAlchemy (``sqlite:///runs.db``, ``postgresql://...``), or
            ``journal:`` and the path of a file.

    Raises:
        RunError: If it is none, or the file of a ledger.
    """
    if place.startswith(JOURNAL):
        path = Path(place.removeprefix(JOURNAL).removeprefix("//")).absolute()
        return lambda: _open_journal(path)
    try:
        url = make_url(place)
    except (ArgumentError, ValueError):
        raise RunError(
            "the mirror's URL cannot be read; it has the form sqlite:///PATH, "
            "postgresql://USER@HOST/DATABASE or journal:PATH"
        ) from None
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite":
        _check_is_no_ledger(Path(url.database or ""))
    return lambda: _open(url)


def let_go(storage: BaseStorage) -> None:
    """End the connections of a storage."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _open_journal(path: Path) -> BaseStorage:
    """Open a journal without the line that a killed process left unfinished.

    Anything written behind such a line would make Optuna refuse all of the file.
    """
    lock = JournalFileSymlinkLock(str(path), STALE_S)
    backend = JournalFileBackend(str(path), lock)  # makes the file
    lock.acquire()
    try:
        with path.open("rb+") as file:
            lines = file.read()
            whole = lines.rfind(b"\n") + 1
            if whole < len(lines):
                log.warning("%s: a line that was not finished is taken off", path)
                file.truncate(whole)
    finally:
        lock.release()
    return JournalStorage(backend)


def _open(url: URL) -> BaseStorage:
    file = url.get_backend_name() == "sqlite"
    # A dashboard writes to the file as well, and locks it for a while.
    settings = {"connect_args": {"timeout": 10}} if file else {}
    storage = RDBStorage(url.render_as_string(hide_password=False), settings)
    if file:
        with closing(sqlite3.connect(str(url.database), timeout=10)) as raw:
            raw.execute("PRAGMA journal_mode = WAL")  # stays: readers lock nothing
    return storage


def _check_is_no_ledger(path: Path) -> None:
    if not path.is_file():
        return
    try:
        with closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        ) as raw:
            found = raw.execute("PRAGMA application_id").fetchone()[0]
    except sqlite3.Error:
        return  # told when it is opened
    if found == APPLICATION:
        raise RunError(f"{path} is a ledger; mirror it to another file")


def _mirrored(
    trial: Trial, distributions: Mapping[str, BaseDistribution]
) -> FrozenTrial:
    """Give a row as a trial of Optuna."""
    finite = {name: _plain(value) for name, value in trial.metrics.items()}
    about = {
        NUMBER: trial.number,
        "origin": trial.origin,
        "state": trial.state,
        "seed": trial.seed,
        "attempts": trial.attempts,
        **({"error": trial.error} if trial.error else {}),
        **{f"time.{name}": _plain(value) for name, value in trial.timings.items()},
    }
    constraints = {k: x for k, x in trial.constraints.items() if not math.isnan(x)}
    state = _STATES.get(trial.state, TrialState.COMPLETE)
    made = optuna.create_trial(
        state=state,
        values=None if state == TrialState.FAIL else list(trial.values),
        params=dict(trial.params),
        distributions={name: distributions[name] for name in trial.params},
        user_attrs={**finite, **about},
        system_attrs=(
            {LEGACY_CONSTRAINTS: list(constraints.values())} if constraints else {}
        ),
        constraints=constraints,
    )
    made.datetime_start, made.datetime_complete = map(
        _local, (trial.started, trial.finished)
    )
    return made


def _plain(value: float) -> float | str:
    """Write what JSON has no number for as text."""
    return value if math.isfinite(value) else str(value)


def _local(time: str) -> datetime:
    """Give a time as Optuna keeps it: local, without a zone."""
    return datetime.fromisoformat(time).astimezone().replace(tzinfo=None)


def _ranges(numbers: Collection[int]) -> Sequence[tuple[int, int]]:
    """Write numbers as ranges, first included and last not.

    Example:
        >>> _ranges({0, 1, 2, 4})
        [(0, 3), (4, 5)]
    """
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1] = found[-1][0], number + 1
        else:
            found.append((number, number + 1))
    return found


def shown(place: str) -> str:
    """Write the URL of a storage without its password."""
    if place.startswith(JOURNAL):
        return place
    return make_url(place).render_as_string(hide_password=True)
