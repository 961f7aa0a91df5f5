"""Finds the database that the rows of a run folder are in, and opens it."""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from autoprune.errors import RunError
from autoprune.searching.addresses import FILE as ADDRESS
from autoprune.searching.addresses import Address, address_of, has_password, parse_url
from autoprune.searching.database import Database
from autoprune.searching.postgres import Postgres
from autoprune.searching.sqlite_file import FILE, SqliteFile

log = logging.getLogger(__name__)


def for_writing(
    run_dir: Path,
    part: str,
    url: str | None,
    *,
    patience: float,
    clock: Callable[[], float],
) -> Database:
    """Open the rows of a part of a run for writing; make its folder if there is none.

    Raises:
        RunError: As `Ledger.open`.
    """
    folder = run_dir / part
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error}") from error
    given = parse_url(url) if url else None
    address = address_of(run_dir, part, given)
    if address is None:
        return SqliteFile.open(folder, clock)
    if (folder / FILE).exists():
        raise RunError(
            f"the rows of {folder} are in its {FILE}, not in {address.url}. Go on "
            "without a URL, or choose another run folder."
        )
    known = (run_dir / ADDRESS).exists()
    with ExitStack() as undo:
        base = Postgres.open(address, url=given, known=known, patience=patience)
        undo.callback(base.close)
        # Only now that the run stands in the database: one that is told and is not
        # there has been lost.
        for where, of in ((run_dir, ""), (folder, part)):
            Address(address.url, address.run, of).write(where)
        undo.pop_all()
    secret = given is not None and has_password(given)
    if secret and not part and "PGPASSWORD" not in os.environ:
        log.warning(
            "the password of the ledger's URL is not kept. Set PGPASSWORD or write it "
            "to ~/.pgpass, so that status, solve and export find the rows"
        )
    return base


def for_reading(folder: Path) -> Database:
    """Open the rows of the folder of a run, or of a part of one, for reading.

    Raises:
        RunError: If it has none, or they cannot be read.
    """
    if (address := Address.read(folder)) is not None:
        return Postgres.read_only(address)
    if not (folder / FILE).is_file():
        raise RunError(f"{folder} is no run folder: it has no {FILE}")
    return SqliteFile.read_only(folder)


def has_rows(folder: Path) -> bool:
    """Tell whether a folder is one of a run, or of a part of one."""
    return (folder / FILE).exists() or (folder / ADDRESS).exists()
