"""Where the rows of a run are, if not in its folder: a database, by its URL."""

import json
import logging
import os
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from autoprune.errors import RunError

log = logging.getLogger(__name__)

FILE = "ledger.json"

PASSWORDS = ("password", "sslpassword")
"""Parameters of a URL that hold a secret."""

_SCHEMES = {"postgres", "postgresql", "postgresql+psycopg"}


@dataclass(frozen=True)
class Address:
    """Where the rows of a part of a run are.

    Attributes:
        url: Of a PostgreSQL database, without a password.
        run: Names the run there.
        part: Names the part of the run; empty for the first.
    """

    url: str
    run: str
    part: str = ""

    @classmethod
    def read(cls, folder: Path) -> "Address | None":
        """Read what a folder keeps; None if its rows are not in a database.

        Raises:
            RunError: If it cannot be read.
        """
        path = folder / FILE
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: str(value) for name, value in kept.items()})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"cannot read {path}, which tells in which database the rows of the "
                f"run are: {error}. Bring it back from a copy. Its keys are url, run "
                "and part, and the runs of a database stand in its table autoprune_meta"
            ) from error

    def write(self, folder: Path) -> None:
        """Keep it in a folder; a folder that has another is refused.

        Raises:
            RunError: If it has one, or it cannot be written.
        """
        path, text = folder / FILE, json.dumps(asdict(self), indent=2) + "\n"
        known = Address.read(folder)
        if known == self:
            return
        try:
            if known is not None and known.run == self.run:
                part = path.with_name(f"{FILE}.{os.getpid()}.part")
                part.write_text(text, encoding="utf-8")
                os.replace(part, path)  # the database has moved
                return
            with path.open("x", encoding="utf-8") as new:
                new.write(text)
        except FileExistsError:
            raise RunError(
                f"another run began in {folder}. Wait for it, or choose another folder."
            ) from None
        except OSError as error:
            raise RunError(f"cannot write {path}: {error}") from error


def address_of(run_dir: Path, part: str, url: URL | None) -> Address | None:
    """Find where the rows of a part of a run are, or are to be.

    Args:
        run_dir: The run folder.
        part: The part of the run.
        url: The database that the user names, if any; else the one it began with.

    Returns:
        None where they are in the folder.
    """
    known = Address.read(run_dir)
    if known is None:
        return Address(plain(url), uuid.uuid4().hex, part) if url else None
    return replace(known, part=part, **({"url": plain(url)} if url else {}))


def parse_url(text: str) -> URL:
    """Read the URL of a PostgreSQL database.

    Raises:
        RunError: If it is none. The message does not repeat a password.
    """
    form = "postgresql://USER@HOST/DATABASE"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise RunError(
            f"the ledger's URL cannot be read; it has the form {form}"
        ) from None
    if url.drivername not in _SCHEMES:
        raise RunError(
            f"a ledger is in PostgreSQL or in the run folder, not in "
            f"{url.drivername!r}. Give {form}, or no URL for a file in the run folder."
        )
    return url.set(drivername="postgresql+psycopg")


def plain(url: URL) -> str:
    """Write a URL without its password.

    Example:
        >>> plain(parse_url("postgresql://me:secret@db.local/team"))
        'postgresql://me@db.local/team'
    """
    # `set` would keep the password where None is given.
    bare = URL.create(
        "postgresql",
        url.username,
        None,
        url.host,
        url.port,
        url.database,
        {name: x for name, x in url.query.items() if name not in PASSWORDS},
    )
    return bare.render_as_string(hide_password=False)


def has_password(url: URL) -> bool:
    """Tell whether a URL holds a password."""
    return url.password is not None or any(name in url.query for name in PASSWORDS)
