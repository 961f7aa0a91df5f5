"""Trials as a table of pandas, and as files beside the ledger."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from autoprune.errors import RunError
from autoprune.searching.rows import Trial

COLUMNS = ["number", "state", "origin", "feasible", "seed", "started", "finished"]
"""What a table has before there is a trial."""


def frame_of(trials: Sequence[Trial]) -> pd.DataFrame:
    """Give trials as a table, one row each; where there is none, its first columns."""
    lines = [_flat(trial) for trial in trials]
    return pd.DataFrame(lines, columns=None if lines else COLUMNS)


def write_tables(frame: pd.DataFrame, folder: Path) -> tuple[Path, Path]:
    """Write ``trials.csv`` and ``trials.parquet``, atomically.

    Raises:
        RunError: If they cannot be written; older tables stay.
    """
    csv, parquet = folder / "trials.csv", folder / "trials.parquet"
    for path, write in ((csv, frame.to_csv), (parquet, frame.to_parquet)):
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            write(part, index=False)
            os.replace(part, path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error}") from error
        finally:
            part.unlink(missing_ok=True)
    return csv, parquet


def _flat(trial: Trial) -> dict[str, Any]:
    """Give a trial as one line of a table, without what only a sampler reads."""
    sites = {f"site.{site}": str(action) for site, action in trial.policy.items()}
    return {
        "number": trial.number,
        "state": trial.state,
        "origin": trial.origin,
        "feasible": trial.feasible,
        **trial.metrics,
        **{f"limit.{name}": value for name, value in trial.constraints.items()},
        **{f"time.{name}": value for name, value in trial.timings.items()},
        "seed": trial.seed,
        "started": trial.started,
        "finished": trial.finished,
        "error": trial.error,
        "policy": trial.policy.fingerprint,
        **sites,
    }
