"""A real PostgreSQL for tests: started on a free port, killed and started again."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg

UNPRIVILEGED = "nobody"
"""Who runs the server where the tests are run by root, whom it refuses."""

ACCESS = """
local all all trust
host all guarded 127.0.0.1/32 scram-sha-256
host all all 127.0.0.1/32 trust
"""

SETTINGS = """
fsync = off
max_connections = 40
shared_buffers = 16MB
dynamic_shared_memory_type = mmap
"""


def binaries() -> Path | None:
    """Find the folder of the server's programs; None if there is none."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    known = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return known[-1].parent if known else None


class PostgresServer:
    """A server of its own folder, port and data."""

    def __init__(self, programs: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="apg-", dir="/tmp"))
        self._programs = programs
        self._data = self.folder / "data"
        self._user = {"user": UNPRIVILEGED} if os.getuid() == 0 else {}
        self._process: subprocess.Popen[bytes] | None = None
        if self._user:
            shutil.chown(self.folder, UNPRIVILEGED)
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        subprocess.run(
            [programs / "initdb", "-N", "-A", "trust", "-U", "postgres"]
            + ["-E", "UTF8", "--no-locale", "-D", self._data],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self._user,
        )
        (self._data / "pg_hba.conf").write_text(ACCESS)
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(SETTINGS)
        self.start()

    def url(self, database: str, user: str = "postgres", password: str = "") -> str:
        """Give the URL of a database."""
        secret = f":{password}" if password else ""
        return f"postgresql://{user}{secret}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        command = [self._programs / "postgres", "-D", self._data, "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-k", self.folder]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, **self._user
            )
        for _ in range(600):
            with suppress(psycopg.OperationalError):
                self.sql("SELECT 1")
                return
            time.sleep(0.05)
        raise TimeoutError((self.folder / "log").read_text())

    def kill(self) -> None:
        """Kill every process of the server at once, as a machine does that fails."""
        assert self._process is not None
        pids = [self._process.pid, *_children(self._process.pid)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        while any(_alive(pid) for pid in pids[1:]):
            time.sleep(0.01)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let every process of the server stand still for a while."""
        assert self._process is not None
        pids = [*_children(self._process.pid), self._process.pid]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def remove(self) -> None:
        """End the server and take its data away."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def sql(self, query: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Carry out a statement, outside of a transaction."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            found = connection.execute(query.encode())
            return found.fetchall() if found.description else []


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
