"""Reads what stands in a run folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoprune.config import RunConfig
from autoprune.errors import PolicyError, RunError
from autoprune.evaluation.provenance import Mix
from autoprune.policy import Policy
from autoprune.searching.fingerprint import differences
from autoprune.searching.ledger import Ledger
from autoprune.searching.opening import has_rows
from autoprune.searching.rows import Trial

CONFIG = "config.yaml"
"""The configuration that the run was begun with."""

WINNER = "policy.json"
"""The winner, with its figures; written when a search ends."""

FINALS = "finals.json"
"""Finalists and rivals on the choice and report splits."""

REFERENCE = "reference.json"
"""In the folder of a further round: whose inputs its variants were made on."""

_OF_MACHINE = ("compute_dtype", "bank")
"""Parts of a fingerprint that another machine may change without any harm."""


def read_config(folder: Path) -> RunConfig:
    """Read the configuration that a run was begun with.

    Raises:
        RunError: If the folder is no run folder.
    """
    if not (folder / CONFIG).exists():
        raise RunError(f"{folder} is no run folder: it has no {CONFIG}")
    return RunConfig.from_yaml(folder / CONFIG)


def read_winner(folder: Path) -> dict[str, Any]:
    """Read the winner and what is recorded with it.

    Raises:
        RunError: If the search has not ended, or the file is damaged.
    """
    path = folder / WINNER
    if not path.exists():
        raise RunError(
            f"{folder} has no winner yet: {WINNER} is written when a search ends. Go "
            "on with 'autoprune search', or name a trial"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        Policy.from_dict(record)
        if record.get("reference"):
            Policy.from_dict(record["reference"])
        Mix.of(record)
    except (OSError, ValueError, KeyError, PolicyError) as error:
        raise RunError(
            f"cannot read the winner {path}: {error}. Give the same search command "
            "again: it writes the file anew from the ledger"
        ) from error
    return dict(record)


def times_basis(fingerprint: Mapping[str, Any]) -> str | None:
    """Say what the times of a run come from; None if it has none."""
    found = fingerprint.get("latency")
    return str(found["device"]) if found else None


def read_trials(folder: Path) -> list[Trial]:
    """Read all trials, also while the run goes on.

    Raises:
        RunError: If the folder has no ledger, or one that cannot be read.
    """
    with Ledger.read(folder) as ledger:
        return ledger.trials()


def name_of(part: str, number: int) -> int | str:
    """Name a trial: its number, with the part of the run that it is of.

    Example:
        >>> name_of("round-2", 13), name_of("", 13)
        ('round-2/13', 13)
    """
    return f"{part}/{number}" if part else number


def read_trial(folder: Path, name: int | str) -> tuple[Trial, Policy | None]:
    """Read one trial.

    Args:
        folder: The run folder.
        name: Its number; ``round-2/13`` in a further round.

    Returns:
        The trial, and in a further round the policy whose inputs its variants were
        made on.

    Raises:
        RunError: If there is none of that name.
    """
    part, _, number = str(name).rpartition("/")
    place = folder / part
    if not number.isdecimal() or part not in ("", *parts_in(folder)):
        known = ", ".join(f"{one}/13" for one in parts_in(folder))
        raise RunError(
            f"{name!r} is no name of a trial; a number such as 13 is"
            + (f", and {known} in its parts" if known else "")
        )
    trials = read_trials(place)
    for trial in trials:
        if trial.number == int(number):
            return trial, _read_reference(place)
    raise RunError(
        f"{place} has no trial {number}; it has {len(trials)}, counted from 0"
    )


def parts_in(folder: Path) -> list[str]:
    """Name the parts of a run beside its first round, by their folders."""
    return sorted(place.name for place in folder.glob("*") if has_rows(place))


def _read_reference(place: Path) -> Policy | None:
    path = place / REFERENCE
    if not path.exists():
        return None
    try:
        return Policy.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, PolicyError) as error:
        raise RunError(
            f"cannot read {path}: {error}. Give the same search command again: it "
            "writes the file anew"
        ) from error


def check_unchanged(folder: Path, now: Mapping[str, Any]) -> None:
    """Refuse a run whose model, text or methods are no longer what they were.

    Args:
        folder: The run folder.
        now: The fingerprint that its configuration gives today.

    Raises:
        RunError: If it differs from the run's; tells where.
    """
    with Ledger.read(folder) as ledger:
        then = ledger.fingerprint
    both = [json.loads(json.dumps(dict(one))) for one in (then, now)]
    for one in both:
        for key in _OF_MACHINE:
            one.pop(key, None)
    if lines := differences(*both):
        raise RunError(
            f"what the run {folder} was made with has changed:\n  "
            + "\n  ".join(lines)
            + "\nBring that back, or search again in another run folder."
        )


def write_text(path: Path, text: str) -> None:
    """Write a file of a run folder whole, or not at all.

    Raises:
        RunError: If it cannot be written, as on a full disk.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
