"""The lock of a run folder: one run writes to it at a time."""

from collections.abc import Callable
from pathlib import Path

import filelock

from autoprune.errors import RunError

LOCK = ".lock"


def take_lock(run_dir: Path, holder: Callable[[], str]) -> filelock.BaseFileLock:
    """Lock a run folder; RunError if another run, which ``holder`` names, has it."""
    lock = filelock.FileLock(run_dir / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise RunError(
            f"another run goes on in {run_dir}: {holder()}. Wait for it, stop "
            "it, or choose another run folder."
        ) from None
    except OSError as error:
        raise RunError(f"cannot lock the run folder {run_dir}: {error}") from error
    return lock
