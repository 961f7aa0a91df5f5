"""Workers on this machine: each a process with a model and threads of its own.

What kills one, out of memory or a crash, costs a trial at most, and never the night.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

from autoprune.errors import RunError
from autoprune.searching.crew import Crew, Job, Outcome
from autoprune.searching.fingerprint import differences
from autoprune.searching.plan import Plan
from autoprune.searching.recipe import Recipe
from autoprune.searching.worker import Done, Ready, Refused

FOLDER = "workers"
"""In the run folder: what workers have said."""

STARTS = 3
"""Deaths in a row before it was ready, after which a worker is not begun again."""

PATIENCE_S = 600.0
"""Time that a job has, at the least, before its worker counts as hanging."""

PATIENCE = 20.0
"""And this many times the longest job so far."""

_START = "from autoprune.searching.worker import main; main()"


@dataclass(eq=False)
class _Worker:
    """A process, and what it does."""

    process: subprocess.Popen[bytes]
    connection: "Connection[Any, Any]"
    log: IO[bytes]
    ready: bool = False
    job: Job | None = None
    since: float = 0.0


class ProcessCrew(Crew):
    """Workers in processes of their own, begun again when they die.

    Args:
        recipe: What they evaluate for.
        size: How many.
        folder: The run folder; what they say goes to ``workers/NUMBER.log`` there.
        time_limit: Seconds that a job may take; None for twenty times the longest so
            far, and ten minutes at the least.
    """

    def __init__(
        self,
        recipe: Recipe,
        size: int,
        folder: Path,
        *,
        time_limit: float | None = None,
    ) -> None:
        self.size = size
        self._recipe = recipe
        self._folder = folder / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._time_limit = time_limit
        self._longest = 0.0
        self._deaths = [0] * size
        self._workers: list[_Worker] = []
        for number in range(size):
            self._workers.append(self._spawn(number))

    def enter(self, plan: Plan) -> None:
        """Have all workers evaluate for another part of the run; none may be busy."""
        recipe = Recipe.of(plan, self._recipe.threads, self._recipe.memory)
        if not differences(self._recipe.fingerprint, recipe.fingerprint):
            return
        self._recipe = recipe
        for worker in self._workers:
            worker.ready = False
            self._send(worker, recipe)

    @property
    def loading(self) -> bool:
        """Whether workers load what they need."""
        return any(not one.ready for one in self._workers)

    def idle(self) -> list[int]:
        """Name the workers that have loaded all they need and have no job."""
        return [n for n, one in enumerate(self._workers) if one.ready and not one.job]

    def submit(self, worker: int, job: Job) -> None:
        """Send a job. If the worker is dead, that is told by ``wait``."""
        one = self._workers[worker]
        one.job, one.since = job, time.monotonic()
        self._send(one, job)

    def wait(self, seconds: float) -> list[Outcome]:
        """Wait for workers; begin those again that have died or hang.

        Raises:
            RunError: If workers die before they are ready, or refuse the run.
        """
        waiting = {one.connection: n for n, one in enumerate(self._workers)}
        heard = wait(list(waiting), min(seconds, self._time_left()))
        outcomes = []
        for connection in heard:
            number = waiting[connection]  # type: ignore[index]
            outcomes.append(self._hear(number))
        outcomes += [self._stop_hanging(n) for n in self._hanging()]
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """End all workers."""
        for one in self._workers:
            _end(one)
        self._workers.clear()

    def _spawn(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        log = (self._folder / f"{number}.log").open("ab")
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the driver's to hear
            )
        _pin(process.pid, number, self.size)
        connection: Connection[Any, Any] = Connection(ours.detach())
        worker = _Worker(process, connection, log)
        self._send(worker, self._recipe)
        return worker

    def _environment(self) -> dict[str, str]:
        """Give workers the driver's import path, and threads before torch counts."""
        threads = str(self._recipe.threads)
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        return {**os.environ, "PYTHONPATH": path, **dict.fromkeys(names, threads)}

    def _send(self, worker: _Worker, message: Any) -> None:
        try:
            worker.connection.send(message)
        except OSError:
            pass  # it is dead; the end of its connection is heard in its turn

    def _hear(self, number: int) -> Outcome | None:
        """Take in what a worker says, or that it is gone."""
        worker = self._workers[number]
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            return self._replace(number, _last_word(worker.process))
        if isinstance(message, Refused):
            raise message.error
        if isinstance(message, Ready):
            worker.ready, self._deaths[number] = True, 0
            return None
        assert isinstance(message, Done)
        if worker.job and worker.job.timed:
            self._longest = max(self._longest, time.monotonic() - worker.since)
        worker.job = None
        return Outcome(number, message.result, message.error)

    def _replace(self, number: int, why: str) -> Outcome | None:
        """Begin a worker anew; tell of the job that went with it."""
        gone = self._workers[number]
        _end(gone)
        if not gone.ready:
            self._deaths[number] += 1
            if self._deaths[number] >= STARTS:
                raise RunError(
                    f"worker {number} died {STARTS} times before it was ready: {why}. "
                    f"See {self._folder / f'{number}.log'}; fewer workers need less "
                    "memory"
                )
        self._workers[number] = self._spawn(number)
        return Outcome(number, lost=why) if gone.job else None

    def _limit(self) -> float:
        if self._time_limit is not None:
            return self._time_limit
        return max(PATIENCE_S, PATIENCE * self._longest)

    def _time_left(self) -> float:
        """Tell how long it is until a job passes its limit."""
        since = [one.since for one in self._workers if one.job and one.job.timed]
        if not since:
            return float("inf")
        return max(0.0, min(since) + self._limit() - time.monotonic())

    def _hanging(self) -> list[int]:
        late = time.monotonic() - self._limit()
        return [
            number
            for number, one in enumerate(self._workers)
            if one.job and one.job.timed and one.since <= late
        ]

    def _stop_hanging(self, number: int) -> Outcome | None:
        return self._replace(number, f"no answer in {self._limit():.0f} s; stopped")


def threads_for(workers: int) -> int:
    """Share the processors out: threads of each worker, one at the least."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _pin(pid: int, number: int, size: int) -> None:
    """Keep a worker on processors of its own, where there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // size
    if share:
        os.sched_setaffinity(pid, cores[number * share : (number + 1) * share])


def _last_word(process: subprocess.Popen[bytes]) -> str:
    """Say what a process died of."""
    try:
        code = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return "it closed its connection"
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, as the kernel does when memory is out"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _end(worker: _Worker) -> None:
    """End a process, whatever it does."""
    worker.connection.close()
    worker.process.kill()
    worker.process.wait()
    worker.log.close()
