"""A ledger in an SQLite file of the run folder."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import filelock
from sqlalchemy import Connection, NullPool, create_engine, event
from sqlalchemy.exc import DBAPIError

from autoprune.errors import RunError
from autoprune.searching.backups import BACKUP, Backups, restoring
from autoprune.searching.database import Database, Found, holder_text, myself
from autoprune.searching.ledger_tables import MIGRATIONS, SCHEMA, Tables
from autoprune.searching.locking import ELSEWHERE, check_file_system, take_lock

FILE = "ledger.sqlite"

APPLICATION = 0x41505255
"""Marks an SQLite file as a ledger ("APRU")."""

_NO_SHARED_MEMORY = {
    "SQLITE_IOERR_LOCK",
    "SQLITE_IOERR_RDLOCK",
    "SQLITE_IOERR_SHMLOCK",
    "SQLITE_IOERR_SHMMAP",
    "SQLITE_IOERR_SHMOPEN",
    "SQLITE_PROTOCOL",
}


class SqliteFile(Database):
    """The tables in a file, in write-ahead mode: readers do not stop the writer.

    The folder must be on a disk of the machine: neither the lock nor the write-ahead
    log holds on NFS.
    """

    def __init__(self, path: Path, raw: sqlite3.Connection) -> None:
        self.path = path
        self.place = str(path)
        self.tables = Tables.of_file()
        self._raw = raw
        self._lock: filelock.BaseFileLock | None = None
        self._backups: Backups | None = None
        engine = create_engine("sqlite://", creator=lambda: raw, poolclass=NullPool)
        raw.isolation_level = None  # transactions begin where SQLAlchemy says

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN")

        self._connection = engine.connect()

    @classmethod
    def open(cls, folder: Path, clock: Callable[[], float] = time.monotonic) -> Self:
        """Open the file of a folder for writing; make it if there is none.

        Raises:
            RunError: If another run holds the folder, its file system cannot hold a
                ledger, or the file cannot be read or written.
        """
        check_file_system(folder)
        lock = take_lock(folder, lambda: _holder(folder))
        path = folder / FILE
        with ExitStack() as undo, _told(path, writing=True):
            undo.callback(lock.release)
            _check_there(path)
            raw = sqlite3.connect(path, timeout=30)
            undo.callback(raw.close)
            _check_format(path, raw)
            _check_whole(raw)
            _set_modes(folder, raw)
            file = cls(path, raw)
            file._make_tables()
            file._backups = Backups(path, clock)
            file._lock = lock
            undo.pop_all()
        return file

    @classmethod
    def read_only(cls, folder: Path) -> Self:
        """Open the file of a folder for reading, also while a run goes on in it."""
        path = folder / FILE
        with ExitStack() as undo, _told(path):
            raw = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30
            )
            undo.callback(raw.close)
            _check_format(path, raw)
            file = cls(path, raw)
            undo.pop_all()
        return file

    def read(self, work: Callable[[Connection], Found]) -> Found:
        """Read in one transaction; RunError if the file is damaged."""
        with _told(self.path), self._connection.begin():
            return work(self._connection)

    def write(self, what: str, work: Callable[[Connection, bool], None]) -> None:
        """Write in one transaction; RunError if that fails, as on a full disk."""
        try:
            with self._connection.begin():
                work(self._connection, False)
        except DBAPIError as error:
            raise RunError(
                f"cannot write {what} to {self.path}: {error.orig}. What was "
                "written before is kept; free the disk and run the same command again."
            ) from error
        if self._backups is not None:
            self._backups.written(self._raw)

    def close(self) -> None:
        """Copy the file if something was written since, and give the folder free."""
        if self._backups is not None and not self._connection.closed:
            self._backups.make(self._raw)
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def _make_tables(self) -> None:
        """Make the tables of a new file, or those of an older one today's."""
        carry_out = self._connection.exec_driver_sql
        with self._connection.begin():
            if not _number(self._raw, "SELECT count(*) FROM sqlite_master"):
                self.tables.metadata.create_all(self._connection, self.tables.all())
            else:
                for older in range(_number(self._raw, "PRAGMA user_version"), SCHEMA):
                    carry_out(MIGRATIONS[older])
            carry_out(f"PRAGMA application_id = {APPLICATION}")
            carry_out(f"PRAGMA user_version = {SCHEMA}")
            self.set_meta(self._connection, "holder", myself())


def _check_there(path: Path) -> None:
    """Refuse to begin anew beside the copy of a file that is gone."""
    if not path.exists() and path.with_name(BACKUP).is_file():
        raise RunError(f"the ledger {path} is gone. {restoring(path)}")


def _check_format(path: Path, raw: sqlite3.Connection) -> None:
    if not _number(raw, "SELECT count(*) FROM sqlite_master"):
        return  # new, or given up while it was made, as on a full disk
    if (found := _number(raw, "PRAGMA application_id")) != APPLICATION:
        raise RunError(
            f"{path} is not a ledger of AutoPrune (application id {found:#x}). "
            "Choose another run folder."
        )
    found = _number(raw, "PRAGMA user_version")
    if found != SCHEMA and found not in MIGRATIONS:
        raise RunError(
            f"{path} has format {found}, this AutoPrune reads {SCHEMA}. Go on "
            "with the version that made it, or choose another run folder."
        )


def _check_whole(raw: sqlite3.Connection) -> None:
    """Find damage before anything is built on it; reads the file once."""
    if (found := raw.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise sqlite3.DatabaseError(found)


def _set_modes(folder: Path, raw: sqlite3.Connection) -> None:
    (mode,) = raw.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise RunError(
            f"the file system of the run folder {folder} has no shared memory: SQLite "
            f"cannot keep a write-ahead log there (mode {mode}). {ELSEWHERE}"
        )
    # Nothing is lost when the process dies; when the power fails, perhaps the last
    # trials. FULL would cost 8 ms a trial.
    raw.execute("PRAGMA synchronous = NORMAL")


def _number(raw: sqlite3.Connection, query: str) -> int:
    return int(raw.execute(query).fetchone()[0])


def _holder(folder: Path) -> str:
    """Name who writes to a folder, as well as can be told."""
    try:
        file = SqliteFile.read_only(folder)
        try:
            return holder_text(file.meta("holder"))
        finally:
            file.close()
    except RunError:
        return holder_text(None)


@contextmanager
def _told(path: Path, *, writing: bool = False) -> Iterator[None]:
    """Tell of a file that cannot be read, or where ``writing``, not be written."""
    try:
        yield
    except (sqlite3.Error, DBAPIError, json.JSONDecodeError, KeyError) as caught:
        error = caught.orig if isinstance(caught, DBAPIError) else caught
        if getattr(error, "sqlite_errorname", None) in _NO_SHARED_MEMORY:
            raise RunError(
                f"the file system of {path} has no locks or shared memory that SQLite "
                f"could use: {error}. {ELSEWHERE}"
            ) from caught
        if writing and isinstance(error, sqlite3.OperationalError):
            raise RunError(
                f"cannot write the ledger {path}: {error}. What was written before is "
                "kept; free the disk and run the same command again."
            ) from caught
        raise RunError(
            f"cannot read the ledger {path}: {error}. It is damaged, or no ledger. "
            f"{restoring(path)}"
        ) from caught
