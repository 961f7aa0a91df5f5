"""Sessions of PostgreSQL: how they are opened, and the lock that one of them holds."""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    NullPool,
    create_engine,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import NoSuchModuleError

from autoprune.errors import RunError
from autoprune.searching.ledger_tables import PREFIX, SCHEMA, Tables

WAIT_S = 5.0
"""How long an own session that broke off may take to end."""

_PARAMETERS = {
    "connect_timeout": 10,
    # A server that is cut off, not stopped, is noticed after half a minute.
    "tcp_user_timeout": 30_000,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""Parameters of libpq; those of the URL come before them."""

_FORMAT = f"{PREFIX}format"

_MAKING = 0x41505255
"""Key of the lock under which tables are made."""

_HOLDERS = text(
    "SELECT l.pid, a.application_name FROM pg_locks l "
    "JOIN pg_stat_activity a ON a.pid = l.pid "
    "JOIN pg_database d ON d.oid = l.database AND d.datname = current_database() "
    "WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted "
    # A key of 64 bits is shown in two halves.
    "AND (l.classid::bigint << 32 | l.objid::bigint) = :key"
)


def engine_of(url: URL, name: str) -> Engine:
    """Make what opens sessions.

    Args:
        url: Of the database.
        name: What its server calls the sessions.

    Raises:
        RunError: If the driver is not installed.
    """
    chosen = {k: x for k, x in _PARAMETERS.items() if k not in url.query}
    given = {**chosen, "application_name": name}
    try:
        return create_engine(url, poolclass=NullPool, connect_args=given)
    except (ImportError, NoSuchModuleError) as error:
        raise RunError(
            f"a ledger in PostgreSQL needs the driver psycopg: {error}. Install it: "
            "pip install 'autoprune[postgres]'"
        ) from error


@contextmanager
def watched(connection: Connection, limit: float) -> Iterator[None]:
    """Break a session off whose server holds the line and does not answer.

    The driver itself would wait for ever.

    Args:
        connection: The session.
        limit: Seconds that all within may take.
    """
    driver: Any = connection.connection.driver_connection
    with socket.socket(fileno=os.dup(driver.fileno())) as line:
        timer = threading.Timer(limit, _hang_up, (line,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # the line is another's once it is closed


def _hang_up(line: socket.socket) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def take_lock(connection: Connection, what: str, name: str) -> bool:
    """Take a lock that lasts as long as the session.

    An own session that broke off may have it still, as its server has not noticed. It
    is ended, and cannot commit any more what is in doubt.

    Args:
        connection: The session.
        what: What is locked.
        name: What the server calls our sessions.

    Returns:
        False if another has it.
    """
    digest = hashlib.sha256(what.encode()).digest()[:8]
    key = {"key": int.from_bytes(digest, "big", signed=True)}
    until = time.monotonic() + WAIT_S
    while True:
        with connection.begin():
            taken = connection.execute(text("SELECT pg_try_advisory_lock(:key)"), key)
            if taken.scalar():
                return True
            holders = connection.execute(_HOLDERS, key).all()
            for pid, _ in [one for one in holders if one[1] == name]:
                connection.execute(
                    text("SELECT pg_terminate_backend(:pid)"), {"pid": pid}
                )
        if any(one[1] != name for one in holders) or time.monotonic() > until:
            return False
        time.sleep(0.05)


def make_tables(connection: Connection, tables: Tables) -> None:
    """Make the tables where there are none.

    Raises:
        RunError: If there are some of another AutoPrune.
    """
    with connection.begin():
        if _has_tables(connection):
            _check_format(connection)
            return
    with connection.begin():  # one at a time; the others find them made
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MAKING})
        if not _has_tables(connection):
            tables.metadata.create_all(connection, tables.all())
            connection.execute(text(f"CREATE TABLE {_FORMAT} (version integer)"))
            made = text(f"INSERT INTO {_FORMAT} VALUES (:version)")
            connection.execute(made, {"version": SCHEMA})
        _check_format(connection)


def check_run(connection: Connection, tables: Tables, place: str) -> None:
    """Refuse a database that lacks the run.

    Raises:
        RunError: If it does, or has tables of another AutoPrune.
    """
    table, run = tables.meta, tables.key["run"]
    with connection.begin():
        found = None
        if _has_tables(connection):
            _check_format(connection)
            query = select(table.c.key).where(table.c.run == run).limit(1)
            found = connection.execute(query).first()
    if found is None:
        raise RunError(
            f"the database {place} has no run {run}. Give the URL of the one that has "
            "it, or choose another run folder."
        )


def _has_tables(connection: Connection) -> bool:
    # to_regclass would remember within a session that there is none.
    return inspect(connection).has_table(_FORMAT)


def _check_format(connection: Connection) -> None:
    found = connection.execute(text(f"SELECT max(version) FROM {_FORMAT}")).scalar()
    if found != SCHEMA:
        raise RunError(
            f"the tables {PREFIX}* of the database have format {found}, this AutoPrune "
            f"reads {SCHEMA}. Use the version that made them, or another database."
        )
