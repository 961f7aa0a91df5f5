"""The run's truth on disk: one row a trial, one writer.

The rows stand in an SQLite file of the run folder, or in a PostgreSQL database.
Optuna's study is rebuilt from them; its own storage pays per parameter, seconds a trial
at hundreds of sites.
"""

import json
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pandas as pd
from sqlalchemy import ColumnElement, Connection, Select, literal_column, select, update

from autoprune.errors import RunError
from autoprune.searching.database import Database
from autoprune.searching.fingerprint import differences
from autoprune.searching.opening import for_reading, for_writing
from autoprune.searching.postgres import PATIENCE_S
from autoprune.searching.rows import Trial, from_row, to_row
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.sqlite_file import FILE
from autoprune.searching.tables import frame_of, write_tables

__all__ = ["FILE", "Ledger"]

AT_ONCE = 500
"""Most trials that are asked for by number in one statement."""


class Ledger:
    """The rows of a run, or of a part of it.

    Opened once for writing, by the driver, under a lock; and for reading by anyone,
    also while the run goes on.

    Attributes:
        run_dir: The folder of the run, or of the part of it.
    """

    def __init__(self, run_dir: Path, database: Database) -> None:
        self.run_dir = run_dir
        self._database = database

    @classmethod
    def open(
        cls,
        run_dir: Path,
        fingerprint: Mapping[str, Any],
        *,
        url: str | None = None,
        part: str = "",
        patience: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Open a run for writing; make its folder if there is none.

        Args:
            run_dir: The run folder.
            fingerprint: What the run was made with, as plain data: space, model, text,
                plugins, seed ... A folder that has another is refused.
            url: Of the PostgreSQL database that has the rows, if not the folder. It is
                kept there without its password, and need not be given again.
            part: The part of the run, a folder in its folder; empty for the first.
            patience: Seconds that a database may be away before the run gives up.
            clock: Gives seconds, for the copies of a file.

        Raises:
            RunError: If another run holds the folder, it was made with something else,
                or its ledger cannot be read or written.
        """
        database = for_writing(run_dir, part, url, patience=patience, clock=clock)
        with ExitStack() as undo:
            undo.callback(database.close)
            ledger = cls(run_dir / part, database)
            ledger._check_fingerprint(fingerprint)
            undo.pop_all()
        return ledger

    @classmethod
    def read(cls, run_dir: Path, part: str = "") -> Self:
        """Open a run for reading, also while it goes on.

        Raises:
            RunError: If it has no ledger, or one that cannot be read.
        """
        return cls(run_dir / part, for_reading(run_dir / part))

    def close(self) -> None:
        """Let go of the rows and give the run free. Doing so twice does no harm."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the run was made with."""
        return dict(self._database.meta("fingerprint", {}))

    @property
    def study_attrs(self) -> dict[str, Any]:
        """What the sampler keeps with the study: the parents of each generation."""
        return dict(self._database.meta("study_attrs", {}))

    @property
    def identity(self) -> str:
        """A name that no other ledger has; empty in a folder of an older AutoPrune."""
        return str(self._database.meta("identity", ""))

    def trials(self, numbers: Collection[int] | None = None) -> list[Trial]:
        """Read the trials that are finished, in the order of their numbers.

        Args:
            numbers: Which; by default all.

        Raises:
            RunError: If they cannot be read.
        """
        table = self._database.tables.trials
        done = table.c.state != "running"
        if numbers is None:
            return self._rows(done)
        wanted = sorted(numbers)
        parts = [wanted[i : i + AT_ONCE] for i in range(0, len(wanted), AT_ONCE)]
        return [
            row for part in parts for row in self._rows(done & table.c.number.in_(part))
        ]

    def running(self) -> list[Trial]:
        """Read the trials that were begun and are not finished."""
        return self._rows(self._database.tables.trials.c.state == "running")

    def numbers(self) -> list[int]:
        """Read the numbers of the trials that are finished."""
        tables = self._database.tables
        table = tables.trials
        query = select(table.c.number).where(
            tables.own(table), table.c.state != "running"
        )
        return self._database.read(lambda c: sorted(c.execute(query).scalars()))

    def begin(self, trial: Trial, study_attrs: Mapping[str, Any] | None = None) -> None:
        """Write a trial that is going to be measured, in the state ``running``.

        Begun again, it replaces its row. Otherwise as `add`.
        """
        if trial.state != "running":
            raise ValueError(f"trial {trial.number} is {trial.state}, not running")
        self._put(trial, study_attrs)

    def add(self, trial: Trial, study_attrs: Mapping[str, Any] | None = None) -> None:
        """Write a finished trial, and what the sampler keeps with the study.

        It takes the place of its row in the state ``running``, if there is one.
        Returns once the row is kept: a killed process loses nothing of it.

        Raises:
            RunError: If it cannot be written, as on a full disk, or is finished
                already. Nothing that was written before is lost.
        """
        if trial.state == "running":
            raise ValueError(f"trial {trial.number} is not finished")
        self._put(trial, study_attrs)

    def amend(
        self,
        number: int,
        system_attrs: Mapping[str, Any],
        study_attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace what the sampler keeps with a trial, and with the study if given."""
        tables = self._database.tables
        table = tables.trials
        change = update(table).where(tables.own(table), table.c.number == number)
        attrs = json.dumps(dict(system_attrs))

        def work(connection: Connection, again: bool) -> None:
            connection.execute(change, {"system_attrs": attrs})
            self._set_study_attrs(connection, study_attrs)

        self._database.write(f"trial {number}", work)

    def add_slopes(self, number: int, slopes: SiteSlopes) -> None:
        """Write the slopes at a trial's policy; RunError if that is not possible."""
        tables = self._database.tables
        row = {"number": number, "data": slopes.to_bytes()}

        def work(connection: Connection, again: bool) -> None:
            connection.execute(*tables.upsert(tables.slopes, row))

        self._database.write(f"the slopes of trial {number}", work)

    def slopes(self) -> dict[int, SiteSlopes]:
        """Read all slopes, by number of their trial."""
        tables = self._database.tables
        table = tables.slopes
        query = select(table.c.number, table.c.data).where(tables.own(table))
        rows = self._database.read(
            lambda c: c.execute(query.order_by(table.c.number)).all()
        )
        return {number: SiteSlopes.from_bytes(data) for number, data in rows}

    def frame(self) -> pd.DataFrame:
        """Give the trials as a table, one row each.

        Metrics stand under their names, timings under ``time.``, limits under
        ``limit.`` and the policy's actions under ``site.``.
        """
        return frame_of(self.trials())

    def write_tables(self) -> tuple[Path, Path]:
        """Write ``trials.csv`` and ``trials.parquet`` in the folder, atomically.

        Raises:
            RunError: If they cannot be written; older tables stay.
        """
        return write_tables(self.frame(), self.run_dir)

    def _rows(self, condition: ColumnElement[bool]) -> list[Trial]:
        tables = self._database.tables
        # All columns that there are: a file of an older AutoPrune has fewer.
        query: Select[Any] = select(literal_column("*")).select_from(tables.trials)
        query = query.where(tables.own(tables.trials), condition)
        query = query.order_by(tables.trials.c.number)
        return self._database.read(
            lambda c: [from_row(dict(row)) for row in c.execute(query).mappings()]
        )

    def _put(self, trial: Trial, study_attrs: Mapping[str, Any] | None) -> None:
        tables = self._database.tables
        row = to_row(trial)
        statement = tables.upsert(tables.trials, row)

        def work(connection: Connection, again: bool) -> None:
            if not connection.execute(*statement).rowcount:
                self._check_same(connection, row, again)
            self._set_study_attrs(connection, study_attrs)

        self._database.write(f"trial {trial.number}", work)

    def _check_same(
        self, connection: Connection, row: Mapping[str, Any], again: bool
    ) -> None:
        """Refuse to write over a finished row; let pass that it is ours already."""
        tables = self._database.tables
        table = tables.trials
        query = select(table).where(tables.own(table), table.c.number == row["number"])
        found = connection.execute(query).mappings().one()
        if not again or any(found[name] != value for name, value in row.items()):
            raise RunError(
                f"trial {row['number']} is finished already in {self._database.place}: "
                "its row is not written over"
            )

    def _set_study_attrs(
        self, connection: Connection, attrs: Mapping[str, Any] | None
    ) -> None:
        if attrs is not None:
            self._database.set_meta(connection, "study_attrs", dict(attrs))

    def _check_fingerprint(self, fingerprint: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(dict(fingerprint)))
        stored = self._database.meta("fingerprint")
        named = self._database.meta("identity") is not None
        if stored is not None and (lines := differences(stored, wanted)):
            raise RunError(
                f"the run folder {self.run_dir} was made with something else:\n  "
                + "\n  ".join(lines)
                + "\nGo back to that, or choose another run folder."
            )

        key = self._database.tables.key
        name = "/".join(filter(None, key.values())) or uuid.uuid4().hex

        def work(connection: Connection, again: bool) -> None:
            if stored is None:
                self._database.set_meta(connection, "fingerprint", wanted)
            if not named:
                self._database.set_meta(connection, "identity", name)

        if stored is None or not named:
            self._database.write("the fingerprint", work)
