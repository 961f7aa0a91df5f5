"""The run's truth on disk: one row a trial, one writer.

The rows stand in an embedded SQLite database. Optuna's study is rebuilt from them; its
own storage pays per parameter, seconds a trial at hundreds of sites.
"""

import json
import os
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import filelock
import pandas as pd

from autoprune.errors import RunError
from autoprune.searching.fingerprint import differences
from autoprune.searching.locking import take_lock
from autoprune.searching.rows import Trial, from_row, to_row, utc_now
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.tables import frame_of, write_tables

FILE = "ledger.sqlite"

SCHEMA = 2
"""Version of the tables; a reader refuses another."""

APPLICATION = 0x41505255
"""Marks an SQLite file as a ledger ("APRU")."""

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trials (
    number INTEGER PRIMARY KEY, state TEXT NOT NULL, origin TEXT NOT NULL,
    policy TEXT NOT NULL, params TEXT NOT NULL, "values" TEXT NOT NULL,
    metrics TEXT NOT NULL, constraints TEXT NOT NULL, timings TEXT NOT NULL,
    system_attrs TEXT NOT NULL, windows TEXT NOT NULL,
    seed INTEGER NOT NULL, started TEXT NOT NULL,
    finished TEXT NOT NULL, error TEXT
);
CREATE TABLE IF NOT EXISTS slopes (number INTEGER PRIMARY KEY, data BLOB NOT NULL);
"""


class Ledger:
    """The rows of a run folder.

    Opened once for writing, by the driver, under a lock of the operating system; and
    for reading by anyone, also while the run goes on. The folder must be on a disk of
    the machine: neither the lock nor SQLite's write-ahead log holds on NFS.
    """

    def __init__(
        self,
        run_dir: Path,
        connection: sqlite3.Connection,
        lock: filelock.BaseFileLock | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._connection = connection
        self._lock = lock

    @classmethod
    def open(cls, run_dir: Path, fingerprint: Mapping[str, Any]) -> Self:
        """Open a run folder for writing; make it if there is none.

        Args:
            run_dir: The run folder.
            fingerprint: What the run was made with, as plain data: space, model, text,
                plugins, seed ... A folder that has another is refused.

        Raises:
            RunError: If another run holds the folder, it was made with something else,
                or its ledger cannot be read.
        """
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the run folder {run_dir}: {error}") from error
        lock = take_lock(run_dir, lambda: _holder(run_dir))
        with ExitStack() as undo, _reading(run_dir / FILE, writing=True):
            undo.callback(lock.release)
            ledger = cls(run_dir, sqlite3.connect(run_dir / FILE, timeout=30), lock)
            undo.callback(ledger.close)
            ledger._check_format()
            ledger._prepare()
            ledger._check_fingerprint(fingerprint)
            undo.pop_all()
        return ledger

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Open a run folder for reading, also while a run goes on in it.

        Raises:
            RunError: If it has no ledger, or one that cannot be read.
        """
        path = run_dir / FILE
        if not path.is_file():
            raise RunError(f"{run_dir} is no run folder: it has no {FILE}")
        with ExitStack() as undo, _reading(path):
            uri = f"{path.resolve().as_uri()}?mode=ro"
            ledger = cls(run_dir, sqlite3.connect(uri, uri=True, timeout=30))
            undo.callback(ledger.close)
            ledger._check_format()
            undo.pop_all()
        return ledger

    def close(self) -> None:
        """Close the file and give the folder free. Doing so twice does no harm."""
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the run was made with."""
        return dict(self._meta("fingerprint", {}))

    @property
    def study_attrs(self) -> dict[str, Any]:
        """What the sampler keeps with the study: the parents of each generation."""
        return dict(self._meta("study_attrs", {}))

    def trials(self) -> list[Trial]:
        """Read all trials, in the order of their numbers.

        Raises:
            RunError: If the file is damaged.
        """
        with _reading(self.run_dir / FILE):
            self._connection.row_factory = sqlite3.Row
            rows = self._connection.execute("SELECT * FROM trials ORDER BY number")
            return [from_row(row) for row in rows]

    def add(self, trial: Trial, study_attrs: Mapping[str, Any] | None = None) -> None:
        """Write a trial, and what the sampler keeps with the study if it changed.

        Returns once the row is in the file: a killed process loses nothing of it.

        Raises:
            RunError: If it cannot be written, as on a full disk. Nothing that was
                written before is lost.
        """
        row = to_row(trial)
        places = ", ".join(f":{name}" for name in row)
        names = ", ".join(f'"{name}"' for name in row)
        with self._writing(f"trial {trial.number}"):
            self._connection.execute(
                f"INSERT INTO trials ({names}) VALUES ({places})", row
            )
            if study_attrs is not None:
                self._set_meta("study_attrs", study_attrs)

    def amend(
        self,
        number: int,
        system_attrs: Mapping[str, Any],
        study_attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace what the sampler keeps with a trial, and with the study if given."""
        with self._writing(f"trial {number}"):
            self._connection.execute(
                "UPDATE trials SET system_attrs = ? WHERE number = ?",
                (json.dumps(dict(system_attrs)), number),
            )
            if study_attrs is not None:
                self._set_meta("study_attrs", study_attrs)

    def add_slopes(self, number: int, slopes: SiteSlopes) -> None:
        """Write the slopes at a trial's policy; RunError if that is not possible."""
        row = number, slopes.to_bytes()
        with self._writing(f"the slopes of trial {number}"):
            self._connection.execute("INSERT OR REPLACE INTO slopes VALUES (?, ?)", row)

    def slopes(self) -> dict[int, SiteSlopes]:
        """Read all slopes, by number of their trial."""
        with _reading(self.run_dir / FILE):
            rows = self._connection.execute("SELECT * FROM slopes ORDER BY number")
            return {number: SiteSlopes.from_bytes(data) for number, data in rows}

    def frame(self) -> pd.DataFrame:
        """Give the trials as a table, one row each.

        Metrics stand under their names, timings under ``time.``, limits under
        ``limit.`` and the policy's actions under ``site.``.
        """
        return frame_of(self.trials())

    def write_tables(self) -> tuple[Path, Path]:
        """Write ``trials.csv`` and ``trials.parquet`` beside the ledger, atomically.

        Raises:
            RunError: If they cannot be written; older tables stay.
        """
        return write_tables(self.frame(), self.run_dir)

    def _check_format(self) -> None:
        if not self._number("SELECT count(*) FROM sqlite_master"):
            return  # new, or given up while it was made, as on a full disk
        path = self.run_dir / FILE
        if (found := self._number("PRAGMA application_id")) != APPLICATION:
            raise RunError(
                f"{path} is not a ledger of AutoPrune (application id {found:#x}). "
                "Choose another run folder."
            )
        if (found := self._number("PRAGMA user_version")) != SCHEMA:
            raise RunError(
                f"{path} has format {found}, this AutoPrune reads {SCHEMA}. Go on "
                "with the version that made it, or choose another run folder."
            )

    def _number(self, query: str) -> int:
        return int(self._connection.execute(query).fetchone()[0])

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        # Nothing is lost when the process dies; when the power fails, perhaps the last
        # trials. FULL would cost 8 ms a trial.
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
        self._connection.execute(f"PRAGMA user_version = {SCHEMA}")
        self._connection.executescript(_TABLES)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": utc_now()}
        with self._writing("the holder"):
            self._set_meta("holder", me)

    def _check_fingerprint(self, fingerprint: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(dict(fingerprint)))
        stored = self._meta("fingerprint", None)
        if stored is None:
            with self._writing("the fingerprint"):
                self._set_meta("fingerprint", wanted)
            return
        if lines := differences(stored, wanted):
            raise RunError(
                f"the run folder {self.run_dir} was made with something else:\n  "
                + "\n  ".join(lines)
                + "\nGo back to that, or choose another run folder."
            )

    def _meta(self, key: str, default: Any) -> Any:
        with _reading(self.run_dir / FILE):
            query = "SELECT value FROM meta WHERE key = ?"
            found = self._connection.execute(query, (key,)).fetchone()
            return default if found is None else json.loads(found[0])

    def _set_meta(self, key: str, value: Any) -> None:
        row = (key, json.dumps(value))
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", row)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            with self._connection:
                yield
        except sqlite3.Error as error:
            raise RunError(
                f"cannot write {what} to {self.run_dir / FILE}: {error}. What was "
                "written before is kept; free the disk and run the same command again."
            ) from error


def _holder(run_dir: Path) -> str:
    """Name who writes to a folder, as well as can be told."""
    found = None
    with suppress(RunError), Ledger.read(run_dir) as ledger:
        found = ledger._meta("holder", None)
    if found is None:
        return "it does not say which"
    return f"process {found['pid']} on {found['host']}, since {found['since']}"


@contextmanager
def _reading(path: Path, *, writing: bool = False) -> Iterator[None]:
    """Tell of a file that cannot be read, or where ``writing``, not be written."""
    try:
        yield
    except (sqlite3.DatabaseError, json.JSONDecodeError, KeyError) as error:
        if writing and isinstance(error, sqlite3.OperationalError):
            raise RunError(
                f"cannot write the ledger {path}: {error}. What was written before is "
                "kept; free the disk and run the same command again."
            ) from error
        raise RunError(
            f"cannot read the ledger {path}: {error}. It is damaged, or no ledger. "
            "Take a copy from before, or choose another run folder."
        ) from error
