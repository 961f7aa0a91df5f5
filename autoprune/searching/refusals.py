"""What an error of PostgreSQL means, and what to do about it."""

from typing import Any

from sqlalchemy.exc import DBAPIError

_LOST = ("08", "57P01", "57P02", "57P03", "57P05")
"""SQL states of a connection that is no more: broken off, or ended by the server."""

_PASSING = {"40001", "40P01", "55P03", "57014"}
"""SQL states that another try may not meet: deadlocks, locks, cancelled statements."""

_FULL = (
    "Its disk is full. What was written before is kept; free the disk of the server "
    "and run the same command again."
)

_BY_STATE = {
    "53100": _FULL,
    "25006": "It takes no writes now: it is a standby, or set to read only. What was "
    "written before is kept; give the URL of the primary, or let it take writes "
    "(default_transaction_read_only), and run the same command again.",
    "42501": "Ask its owner for the right: GRANT CREATE, USAGE ON SCHEMA public and "
    "GRANT SELECT, INSERT, UPDATE ON its tables autoprune_* TO your user.",
    "42P01": "It has no tables of AutoPrune; the run is in another database.",
}

_BY_TEXT = (
    (("No space left",), _FULL),
    (
        ("password authentication failed", "no password supplied"),
        "Set PGPASSWORD, or write the password to ~/.pgpass.",
    ),
    (("role ",), "Give the URL an existing user, or make this one: createuser."),
    (("database ",), "Make the database: createdb; or correct its name in the URL."),
    (("pg_hba.conf",), "Let this host and user in, in the server's pg_hba.conf."),
    (
        ("invalid response", "expected authentication", "server closed"),
        "What answers there may be no PostgreSQL; see host and port in the URL.",
    ),
)
"""Errors before there is a session have no state, only text."""

_OTHERWISE = "What was written before is kept; the server's log may say more."

_UNREACHED = (
    "See that the server is up, and host and port in the URL; then run the same "
    "command again."
)


def state_of(error: DBAPIError) -> str:
    """Give the five letters that name an error in SQL; empty if there are none."""
    return str(getattr(error.orig, "sqlstate", None) or "")


def is_lost(error: DBAPIError) -> bool:
    """Tell whether an error means that the connection is no more."""
    return error.connection_invalidated or state_of(error).startswith(_LOST)


def is_passing(error: DBAPIError) -> bool:
    """Tell whether the same transaction may succeed if it is tried again."""
    return state_of(error) in _PASSING


def advice(error: DBAPIError) -> str:
    """Say what to do about an error."""
    state, said = state_of(error), _one_line(error.orig)
    if state:
        return _BY_STATE.get(state, _OTHERWISE)
    for parts, told in _BY_TEXT:
        if any(part in said for part in parts):
            return told
    return _UNREACHED


def reason(error: DBAPIError) -> str:
    """Give what the server or the driver says, on one line, without a full stop."""
    return _one_line(error.orig).rstrip(".")


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
