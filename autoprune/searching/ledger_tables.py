"""The tables of a ledger, in a file of its own or in a database with other runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    and_,
    true,
)
from sqlalchemy.dialects import postgresql, sqlite

SCHEMA = 3
"""Version of the tables; a reader refuses another."""

MIGRATIONS = {
    2: "ALTER TABLE trials ADD COLUMN attempts INTEGER NOT NULL DEFAULT 1",
}
"""What makes the tables of a version, in a file, those of the next."""

PREFIX = "autoprune_"
"""Before the names of tables in a database that others use too, as Optuna may."""

_TEXTS = (
    ("state", "origin", "policy", "params", "values", "metrics", "constraints")
    + ("timings", "system_attrs", "windows", "started", "finished")
)  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """Tables, with what marks the rows of one ledger in them.

    Attributes:
        insert: Makes a statement that inserts, as the database spells it.
        key: Columns that all rows of the ledger have alike: run and part. None in a
            file, which holds one ledger.
        prefix: What the names of the tables begin with.
    """

    insert: Callable[[Table], Any]
    key: Mapping[str, str]
    prefix: str

    @classmethod
    def of_file(cls) -> "Tables":
        """Give the tables of an SQLite file."""
        return cls(sqlite.insert, {}, "")

    @classmethod
    def of_server(cls, run: str, part: str) -> "Tables":
        """Give the tables of a PostgreSQL database, for one part of a run."""
        return cls(postgresql.insert, {"run": run, "part": part}, PREFIX)

    @cached_property
    def metadata(self) -> MetaData:
        """All tables together."""
        return MetaData()

    @cached_property
    def trials(self) -> Table:
        """One row a trial."""
        texts = [Column(name, Text, nullable=False) for name in _TEXTS]
        return self._table(
            "trials",
            Column("number", Integer, primary_key=True, autoincrement=False),
            *texts,
            Column("seed", BigInteger, nullable=False),
            Column("error", Text),
            Column("attempts", Integer, nullable=False, server_default="1"),
        )

    @cached_property
    def slopes(self) -> Table:
        """The slopes at the policies of some trials."""
        return self._table(
            "slopes",
            Column("number", Integer, primary_key=True, autoincrement=False),
            Column("data", LargeBinary, nullable=False),
        )

    @cached_property
    def meta(self) -> Table:
        """What is kept once, as JSON by name."""
        return self._table(
            "meta",
            Column("key", Text, primary_key=True),
            Column("value", Text, nullable=False),
        )

    def all(self) -> list[Table]:
        """List the tables."""
        return [self.meta, self.trials, self.slopes]

    def own(self, table: Table) -> ColumnElement[bool]:
        """Tell the rows of this ledger from those of others."""
        return and_(true(), *(table.c[name] == x for name, x in self.key.items()))

    def upsert(self, table: Table, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """Make the statement that writes a row, and what it is carried out with.

        A row of a trial takes the place of one that is running, no other; look at the
        statement's count of rows.
        """
        return self._upserts[table.name], {**self.key, **row}

    @cached_property
    def _upserts(self) -> dict[str, Any]:
        return {table.name: self._upsert(table) for table in self.all()}

    def _upsert(self, table: Table) -> Any:
        insert = self.insert(table)
        keys = list(table.primary_key.columns)
        changes = {c.name: insert.excluded[c.name] for c in table.c if c not in keys}
        where = table.c.state == "running" if table is self.trials else None
        changed = insert.on_conflict_do_update(
            index_elements=keys, set_=changes, where=where
        )
        return changed.execution_options(preserve_rowcount=True)

    def _table(self, name: str, *columns: Column[Any]) -> Table:
        own = [Column(name, Text, primary_key=True) for name in self.key]
        return Table(self.prefix + name, self.metadata, *own, *columns)
