"""A ledger in a PostgreSQL database, where a team sees it."""

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Self

from sqlalchemy import URL, Connection
from sqlalchemy.exc import DBAPIError

from autoprune.errors import RunError
from autoprune.searching.addresses import Address, parse_url
from autoprune.searching.database import Database, Found, holder_text, myself
from autoprune.searching.ledger_tables import Tables
from autoprune.searching.refusals import advice, is_lost, is_passing, reason
from autoprune.searching.sessions import (
    WAIT_S,
    check_run,
    engine_of,
    make_tables,
    take_lock,
    watched,
)

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""How long a database may be away before a run gives up."""

FIRST_PAUSE_S = 0.1
"""Pause between the first two tries; the next are twice as long each."""

LONGEST_PAUSE_S = 5.0

READING_S = 600.0
"""How long a reader waits for rows; a writer waits for as long as it has patience."""


class Postgres(Database):
    """The tables in a database that holds other runs as well.

    A writer holds an advisory lock of its session. It writes in that session only, so
    that one that has lost its lock cannot write. Through a pooler this needs sessions
    of its own (PgBouncer: ``pool_mode = session``).

    Args:
        address: Where.
        url: The same with the password, if the user gave one.
        patience: Seconds that the database may be away, once it was there.
        writer: False to read only.
    """

    def __init__(
        self, address: Address, *, url: URL | None, patience: float, writer: bool
    ) -> None:
        self.address = address
        self.place = address.url
        self.tables = Tables.of_server(address.run, address.part)
        self._patience = patience
        self._writer = writer
        self._name = f"autoprune {uuid.uuid4().hex}" if writer else "autoprune reader"
        self._engine = engine_of(url or parse_url(address.url), self._name)
        self._connection: Connection | None = None

    @classmethod
    def open(
        cls,
        address: Address,
        *,
        url: URL | None,
        known: bool,
        patience: float = PATIENCE_S,
    ) -> Self:
        """Open a part of a run for writing.

        Args:
            address: Where.
            url: The same with the password, if the user gave one.
            known: True if the run must be there already.
            patience: Seconds that the database may be away, once it was there.

        Raises:
            RunError: If the server refuses, has no such run, or another writes to it.
        """
        base = cls(address, url=url, patience=patience, writer=True)
        with ExitStack() as undo, base._refusing("open"):
            undo.callback(base.close)
            base._connection = connection = base._engine.connect()
            if known:
                check_run(connection, base.tables, base.place)
            else:
                make_tables(connection, base.tables)
            base._lock(connection)
            me = {**myself(), "session": base._name}
            with connection.begin():
                base.set_meta(connection, "holder", me)
            undo.pop_all()
        return base

    @classmethod
    def read_only(cls, address: Address) -> Self:
        """Open a part of a run for reading, also while the run goes on."""
        base = cls(address, url=None, patience=PATIENCE_S, writer=False)
        with ExitStack() as undo, base._refusing("read"):
            undo.callback(base.close)
            base._connection = connection = base._engine.connect()
            check_run(connection, base.tables, base.place)
            undo.pop_all()
        return base

    def read(self, work: Callable[[Connection], Found]) -> Found:
        """Read in one transaction, again if the connection breaks off."""
        return self._carry_out("read", lambda connection, _: work(connection))

    def write(self, what: str, work: Callable[[Connection, bool], None]) -> None:
        """Write in one transaction, again if the connection breaks off."""
        if not self._writer:
            raise RunError(f"cannot write {what} to {self.place}: opened readonly")
        self._carry_out(f"write {what} to", work)

    def close(self) -> None:
        """End the session, and with it the lock."""
        self._drop()
        self._engine.dispose()

    def _carry_out(self, what: str, work: Callable[[Connection, bool], Found]) -> Found:
        """Carry out a transaction, as often as patience allows."""
        try:
            return self._once(work, again=False)
        except DBAPIError as error:
            if not self._may_try_again(error):
                raise self._refused(what, error) from error
            first = error
        log.warning("the database %s is away: %s", self.place, reason(first))
        began, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            try:
                found = self._once(work, again=True)
            except DBAPIError as error:
                if not self._may_try_again(error):
                    raise self._refused(what, error) from error
                if time.monotonic() - began > self._patience:
                    raise self._gone(what, error) from error
                continue
            away = time.monotonic() - began
            log.warning("the database %s is back after %.1f s", self.place, away)
            return found

    def _once(self, work: Callable[[Connection, bool], Found], *, again: bool) -> Found:
        connection = self._connection or self._connect_again()
        limit = self._patience if self._writer else READING_S
        with watched(connection, limit), connection.begin():
            return work(connection, again)

    def _connect_again(self) -> Connection:
        """Open a session in place of a lost one; keep it only once it has the lock."""
        connection = self._engine.connect()
        with ExitStack() as undo, watched(connection, max(self._patience, WAIT_S)):
            undo.callback(_discard, connection)
            if self._writer:
                self._lock(connection)
                self._check_held(connection)
            undo.pop_all()
        self._connection = connection
        return connection

    def _may_try_again(self, error: DBAPIError) -> bool:
        """Tell whether an error may pass; let go of a session that is no more."""
        if self._connection is not None and is_lost(error):
            self._drop()
        return self._connection is None or is_passing(error)

    def _lock(self, connection: Connection) -> None:
        what = f"{self.address.run}/{self.address.part}"
        if not take_lock(connection, what, self._name):
            with connection.begin():
                holder = holder_text(self.meta_in(connection, "holder"))
            raise RunError(
                f"another run goes on in {self.place} as run {self.address.run}: "
                f"{holder}. Wait for it, stop it, or choose another run folder."
            )

    def _check_held(self, connection: Connection) -> None:
        """Refuse to go on behind another run that wrote while the lock was lost."""
        with connection.begin():
            found = self.meta_in(connection, "holder") or {}
        if found.get("session") != self._name:
            raise RunError(
                f"while the database {self.place} was away, another run began to write "
                f"to run {self.address.run}: {holder_text(found)}. This one ends; its "
                "finished trials are kept."
            )

    def _drop(self) -> None:
        if self._connection is not None:
            _discard(self._connection)
            self._connection = None

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise self._refused(what, error) from error

    def _refused(self, what: str, error: DBAPIError) -> RunError:
        return RunError(
            f"cannot {what} the ledger {self.place}: {reason(error)}. {advice(error)}"
        )

    def _gone(self, what: str, error: DBAPIError) -> RunError:
        return RunError(
            f"cannot {what} the ledger {self.place}: it has been away for "
            f"{self._patience:g} s ({reason(error)}). What was written before is kept; "
            "start the server and run the same command again."
        )


def _discard(connection: Connection) -> None:
    """End a session that may be broken."""
    with suppress(DBAPIError):
        connection.invalidate()
    connection.close()
