"""Reads what stands in a run folder."""

import json
from pathlib import Path
from typing import Any

from autoprune.config import RunConfig
from autoprune.errors import RunError
from autoprune.searching.ledger import Ledger
from autoprune.searching.rows import Trial

CONFIG = "config.yaml"
"""The configuration that the run was begun with."""

WINNER = "policy.json"
"""The winner, with its figures; written when a search ends."""

FINALS = "finals.json"
"""Finalists and rivals on the choice and report splits."""


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
        RunError: If the search has not ended.
    """
    path = folder / WINNER
    if not path.exists():
        raise RunError(
            f"{folder} has no winner yet: {WINNER} is written when a search ends. Go "
            "on with 'autoprune search', or name a trial"
        )
    return dict(json.loads(path.read_text(encoding="utf-8")))


def read_trials(folder: Path) -> list[Trial]:
    """Read all trials, also while the run goes on.

    Raises:
        RunError: If the folder has no ledger, or one that cannot be read.
    """
    with Ledger.read(folder) as ledger:
        return ledger.trials()


def read_trial(folder: Path, number: int) -> Trial:
    """Read one trial.

    Raises:
        RunError: If there is none of that number.
    """
    trials = read_trials(folder)
    for trial in trials:
        if trial.number == number:
            return trial
    raise RunError(
        f"{folder} has no trial {number}; it has {len(trials)}, counted from 0"
    )
