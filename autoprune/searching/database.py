"""What a ledger asks of the database that its rows are in."""

import json
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Connection, select

from autoprune.searching.ledger_tables import Tables
from autoprune.searching.rows import utc_now

Found = TypeVar("Found")


class Database(ABC):
    """The tables of one ledger, and a connection to them.

    Attributes:
        tables: The tables, and whose rows in them are meant.
        place: Where they are, for messages.
    """

    tables: Tables
    place: str

    @abstractmethod
    def read(self, work: Callable[[Connection], Found]) -> Found:
        """Read in one transaction.

        Raises:
            RunError: If that is not possible.
        """

    @abstractmethod
    def write(self, what: str, work: Callable[[Connection, bool], None]) -> None:
        """Write in one transaction: all of it, durably, or nothing.

        Args:
            what: What is written, for messages.
            work: Writes. It is called again where the connection broke off, with true:
                what it wrote before may stand already.

        Raises:
            RunError: If that is not possible. What was written before is kept.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the database. Doing so twice does no harm."""

    def meta(self, key: str, default: Any = None) -> Any:
        """Read what is kept once under a name."""
        return self.read(lambda connection: self.meta_in(connection, key, default))

    def meta_in(self, connection: Connection, key: str, default: Any = None) -> Any:
        """Read what is kept once under a name, in a transaction that has begun."""
        table = self.tables.meta
        own = select(table.c.value).where(self.tables.own(table), table.c.key == key)
        found = connection.execute(own).scalar()
        return default if found is None else json.loads(found)

    def set_meta(self, connection: Connection, key: str, value: Any) -> None:
        """Keep something once under a name."""
        row = {"key": key, "value": json.dumps(value)}
        connection.execute(*self.tables.upsert(self.tables.meta, row))


def myself() -> dict[str, Any]:
    """Say who writes from here on, as a ledger keeps it."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": utc_now()}


def holder_text(found: Any) -> str:
    """Name who writes to a ledger, from what it keeps."""
    if not found:
        return "it does not say which"
    return f"process {found['pid']} on {found['host']}, since {found['since']}"
