"""Live copies of a ledger's file, for the day on which it is damaged."""

import logging
import os
import shlex
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path

log = logging.getLogger(__name__)

BACKUP = "ledger.backup.sqlite"

INTERVAL_S = 300.0
"""Time of writing between two copies."""

MOST_SHARE = 0.01
"""Most of the time that copies may take; a large ledger is copied less often."""


class Backups:
    """The copy beside a ledger's file, made while that is written to, whole or not.

    Args:
        path: The ledger's file.
        clock: Gives seconds.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._last = clock()
        self._took_s = 0.0
        self._changed = False
        self._failed = False
        for left in path.parent.glob(f"{BACKUP}.*.part*"):
            left.unlink(missing_ok=True)  # of a process that was killed

    def written(self, source: sqlite3.Connection) -> None:
        """Hear that something was written; make a copy if it is time."""
        self._changed = True
        wait = max(INTERVAL_S, self._took_s / MOST_SHARE)
        if self._clock() - self._last >= wait:
            self.make(source)

    def make(self, source: sqlite3.Connection) -> None:
        """Copy what was written since the last copy; a failure is told, once."""
        if not self._changed:
            return
        begin = self._clock()
        try:
            _copy(source, self.path.with_name(BACKUP))
            self._changed = self._failed = False
        except (OSError, sqlite3.Error) as error:
            if not self._failed:
                log.warning(
                    "cannot copy the ledger %s: %s. The run goes on; its older copy, "
                    "if there is one, is kept",
                    self.path,
                    error,
                )
            self._failed = True
        self._last = self._clock()
        self._took_s = self._last - begin


def restoring(path: Path) -> str:
    """Say what copy there is of a damaged ledger, and how it takes its place."""
    backup = path.with_name(BACKUP)
    try:
        with closing(
            sqlite3.connect(f"{backup.resolve().as_uri()}?mode=ro", uri=True)
        ) as copy:
            if copy.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("it is damaged as well")
            query = "SELECT count(*) FROM trials WHERE state != 'running'"
            (trials,) = copy.execute(query).fetchone()
        made = datetime.fromtimestamp(backup.stat().st_mtime, UTC)
    except (OSError, sqlite3.Error):
        return "Take a copy from before, or choose another run folder."
    names = [path, path.with_name("damaged.sqlite"), backup]
    old, aside, new = (shlex.quote(str(name)) for name in names)
    away = f"mv {old} {aside} && " if path.exists() else ""
    return (
        f"{backup.name} beside it is a copy of {made:%Y-%m-%d %H:%M:%S} UTC with "
        f"{trials} trials. To go on from there:\n"
        f"  {away}rm -f {old}-wal {old}-shm && mv {new} {old}"
    )


def _copy(source: sqlite3.Connection, target: Path) -> None:
    """Copy a database, check the copy, and only then put it in its place."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with closing(sqlite3.connect(part)) as copy:
            copy.execute("PRAGMA synchronous = OFF")  # made durable below, at once
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, no log beside it
            if (
                found := copy.execute("PRAGMA integrity_check(1)").fetchone()[0]
            ) != "ok":
                raise sqlite3.DatabaseError(f"the copy is damaged: {found}")
        _sync(part)
        os.replace(part, target)
        _sync(target.parent)
    finally:
        for name in (part, part.with_name(f"{part.name}-journal")):
            with suppress(OSError):
                name.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
