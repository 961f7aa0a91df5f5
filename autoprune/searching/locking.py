"""The lock of a run folder: one run writes to it at a time."""

import errno
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock

from autoprune.errors import RunError

LOCK = ".lock"

MOUNTS = Path("/proc/self/mountinfo")
"""Where Linux tells what is mounted where."""

OVER_NETWORK = frozenset(
    {"afs", "cifs", "fuse.sshfs", "nfs", "nfs4", "smb3", "smbfs"}
)  # fmt: skip
"""File systems on which machines do not see each other's locks and shared memory."""

ELSEWHERE = (
    "Put the run folder on a disk of this machine, or keep the rows in PostgreSQL with "
    "--ledger postgresql://USER@HOST/DATABASE."
)
"""What to do where a file system cannot hold a ledger."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def take_lock(run_dir: Path, holder: Callable[[], str]) -> filelock.BaseFileLock:
    """Lock a run folder; RunError if another run, which ``holder`` names, has it."""
    lock = filelock.FileLock(run_dir / LOCK)
    try:
        with warnings.catch_warnings():  # of a lock that a dead process leaves behind
            warnings.simplefilter("ignore")
            lock.acquire(blocking=False)
    except filelock.Timeout:
        raise RunError(
            f"another run goes on in {run_dir}: {holder()}. Wait for it, stop "
            "it, or choose another run folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        number = error.errno if isinstance(error, OSError) else errno.ENOSYS
        if number in _NO_LOCKS:
            raise _without_locks(run_dir, str(error)) from error
        raise RunError(f"cannot lock the run folder {run_dir}: {error}") from error
    if isinstance(lock, filelock.SoftFileLock):
        lock.release()
        raise _without_locks(run_dir, "flock is not implemented")
    return lock


def check_file_system(run_dir: Path, mounts: Path = MOUNTS) -> None:
    """Refuse a folder that other machines can write to without our knowing.

    Where the system does not tell what is mounted, nothing is refused.

    Raises:
        RunError: If the folder is on a network file system.
    """
    kind = _kind_of(run_dir.resolve(), mounts)
    if kind in OVER_NETWORK:
        raise RunError(
            f"the run folder {run_dir} is on a network file system ({kind}), where "
            f"neither locks nor SQLite's write-ahead log hold. {ELSEWHERE}"
        )


def _without_locks(run_dir: Path, found: str) -> RunError:
    return RunError(
        f"the file system of the run folder {run_dir} has no locks ({found}), so that "
        f"two runs could write to it at once. {ELSEWHERE}"
    )


def _kind_of(folder: Path, mounts: Path) -> str | None:
    """Name the file system that a folder is on; the last mount over a path counts."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found: tuple[int, str] | None = None
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace(r"\040", " "))
        depth = len(point.parts)
        if folder.is_relative_to(point) and (found is None or depth >= found[0]):
            found = depth, after.split()[0]
    return found[1] if found else None
