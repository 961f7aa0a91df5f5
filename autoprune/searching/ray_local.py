"""What a Ray cluster of our own needs on this machine, and how to leave no trace."""

import faulthandler
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import ray

from autoprune.errors import RunError

LONGEST = 40
"""Letters of the path of a cluster's files, so that those of its sockets keep within
the 107 that Unix allows."""

_PREFIX = "autoprune-ray-"

_ABANDONED_S = 600.0


def check_loopback() -> None:
    """Refuse a machine without loopback: there Ray hangs for two minutes."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2.0).close()
    except OSError as error:
        raise RunError(
            f"cannot start a Ray cluster on this machine: its loopback interface does "
            f"not work ({error}). Bring it up: ip link set lo up"
        ) from error


def make_folder() -> Path:
    """Make the folder of a cluster's files, where its path is short."""
    places = dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"))
    for place in map(Path, places):
        _sweep(place)
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
            if len(str(folder)) <= LONGEST:
                return folder
            folder.rmdir()
    raise RunError(
        f"a Ray cluster needs a folder whose path has {LONGEST} letters at the most; "
        f"none of {', '.join(places)} can be written. Set TMPDIR to a short one"
    )


def remove_cluster(folder: Path) -> None:
    """End what is left of a cluster of our own, and remove its folder."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError, ValueError):
            words = process.read_bytes()
            if os.fsencode(folder) + b"/" in words:
                os.kill(int(process.parent.name), signal.SIGKILL)
    for _ in range(20):  # the last words of the dying
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.25)


def _sweep(place: Path) -> None:
    """Remove the folders of clusters whose processes were killed."""
    for folder in place.glob(f"{_PREFIX}*/session_latest"):
        with suppress(OSError):
            status = folder.lstat()
            old = time.time() - status.st_mtime > _ABANDONED_S
            if old and status.st_uid == os.getuid() and not _lives(folder):
                shutil.rmtree(folder.parent, ignore_errors=True)


def _lives(session: Path) -> bool:
    """Tell whether somebody serves the sockets of a cluster."""
    for path in (session / "sockets").glob("raylet*"):
        with socket.socket(socket.AF_UNIX) as tried, suppress(OSError):
            tried.connect(str(path))
            return True
    return False


@cache
def _token() -> str:
    """Give the secret of the clusters of this process; Ray remembers the first."""
    return uuid.uuid4().hex


def set_token() -> None:
    """Give a cluster of our own a secret, unless the user has one.

    Otherwise Ray would write one to the home folder, for everybody to read.
    """
    given = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    with suppress(RuntimeError):  # there is no home
        if (Path.home() / ".ray" / "auth_token").exists():
            return
    if not any(name in os.environ for name in given):
        os.environ["RAY_AUTH_TOKEN"] = _token()


@contextmanager
def unchanged() -> Iterator[None]:
    """Put back what Ray changes in a process: signals, limits, variables, output."""
    main = threading.current_thread() is threading.main_thread()
    handler, hook = signal.getsignal(signal.SIGTERM), sys.excepthook
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    traces, log = faulthandler.is_enabled(), logging.getLogger("ray")
    kept, told = (log.level, log.propagate, list(log.handlers)), _variables()
    # It prints to the standard output, log_to_driver or not, that a worker has died.
    worker: Any = ray._private.worker
    printing = vars(worker).get("_worker_logs_enabled", True)
    worker._worker_logs_enabled = False
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        yield
    finally:
        worker._worker_logs_enabled = printing
        for name in _variables().keys() - told.keys():
            del os.environ[name]
        os.environ.update(told)
        log.level, log.propagate, log.handlers[:] = kept
        sys.excepthook = hook
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        if not traces:
            faulthandler.disable()
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        with suppress(AttributeError):  # it remembers RAY_AUTH_MODE
            core: Any = ray._raylet
            core.Config.initialize("")


def _variables() -> dict[str, str]:
    """Give the variables of the environment that Ray and we for it may change."""
    own = ("PYTHONPATH", "PYTHONBREAKPOINT")
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("RAY_", "TUNE_")) or name in own
    }
