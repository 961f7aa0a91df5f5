"""Ray clusters: one of our own on this machine, or one that is there already.

What Ray changes in this process is put back when the cluster is left, and what it
writes on the disk for a cluster of our own goes with it.
"""

import gc
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Self

import ray

from autoprune.errors import RunError
from autoprune.searching.ray_local import (
    check_loopback,
    make_folder,
    remove_cluster,
    set_token,
    unchanged,
)

CONNECT_S = 10.0
"""Time that an address has to take a connection."""

PROBE_S = 90.0
"""Time that a cluster has to let somebody in."""

SILENT_S = 30.0
"""Time that the head of a cluster may be away before the run ends: Ray ends the whole
process, without a word, after a minute."""

STARTS = 3
"""How often a cluster of our own is started that does not come up."""

STORE_BYTES = 100 * 2**20
"""Of the object store: what goes to evaluators and back is small. Ray takes 30 % of the
memory by default."""

_PROBE = (
    "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, "
    "logging_level='ERROR'); ray.nodes(); ray.shutdown()"
)


class Cluster:
    """A Ray cluster that this process is in, until it is closed.

    Args:
        name: What messages call it.
        undo: What closing does.
    """

    def __init__(self, name: str, undo: ExitStack) -> None:
        self.name = name
        self._undo = undo
        self._heard = time.monotonic()

    @classmethod
    def open(cls, address: str | None, *, cpus: float = 0.0) -> Self:
        """Join a cluster, or start one on this machine.

        A cluster that the process is in already is used, and left as it is.

        Args:
            address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``; None for a cluster
                of our own, which ends with this process.
            cpus: That a cluster of our own has to offer, at the least.

        Raises:
            RunError: If that is not possible, within bounded time.
        """
        if ray.is_initialized():
            return cls("the cluster that this process is in", ExitStack())
        with ExitStack() as undo:
            undo.enter_context(unchanged())
            if address is None:
                _start(cpus, undo)
            else:
                _join(address, undo)
            return cls(address or "the local cluster", undo.pop_all())

    def room(self, cpus: float, gpus: float) -> int | None:
        """Count the evaluators that all nodes have room for, whoever is there now.

        Returns:
            Their number; None while the head of the cluster is away.

        Raises:
            RunError: If it has been away for long: the cluster is gone.
        """
        if not self.answers():  # Ray would wait, and then end the process
            return None
        return sum(
            _fitting(node["Resources"], cpus, gpus)
            for node in self._call(ray.nodes)
            if node["Alive"]
        )

    def resources(self) -> str:
        """Tell what all nodes have."""
        found = self._call(ray.cluster_resources)
        return f"{found.get('CPU', 0):g} CPUs, {found.get('GPU', 0):g} GPUs"

    def at_close(self, act: Callable[[], None]) -> None:
        """Have something done when the cluster is left."""
        self._undo.callback(act)

    def close(self) -> None:
        """Leave the cluster; end it if it is our own. Twice does no harm."""
        self._undo.close()

    def answers(self) -> bool:
        """Tell whether the head of the cluster answers.

        Raises:
            RunError: If it has not for long: the cluster is gone.
        """
        client: Any = ray.util.client.ray
        if client.is_connected():
            return True  # calls of such a connection fail by themselves
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
        except OSError as error:
            if time.monotonic() - self._heard > SILENT_S:
                raise RunError(
                    f"{self.name} is gone: its head at {host}:{port} does not answer "
                    f"({error}). No finished trial is lost; the same command goes on"
                ) from error
            return False
        self._heard = time.monotonic()
        return True

    def _call(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise RunError(
                f"{self.name} is gone: {error}. No finished trial is lost; the same "
                "command goes on"
            ) from error


def _fitting(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Count the evaluators that a node has room for."""
    asked = (("CPU", cpus), ("GPU", gpus))
    return min(int(node.get(of, 0) / wanted + 1e-6) for of, wanted in asked if wanted)


def _start(cpus: float, undo: ExitStack) -> None:
    """Start a cluster on this machine."""
    check_loopback()
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    set_token()
    settings = {
        "address": "local",
        "num_cpus": max(len(os.sched_getaffinity(0)), math.ceil(cpus)),
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
    }
    for _ in range(STARTS):  # on a busy machine it may come too late for Ray
        folder = make_folder()
        refused = _init({**settings, "_temp_dir": str(folder)})
        if not refused:
            undo.callback(remove_cluster, folder)
            undo.callback(_leave)
            return
        _leave()
        remove_cluster(folder)
    raise RunError(
        f"cannot start a Ray cluster on this machine: {refused}. Try again when it is "
        "less busy, or take --workers without an engine, which needs no Ray"
    )


def _join(address: str, undo: ExitStack) -> None:
    """Join a cluster, once a process of its own has shown that this is possible.

    Ray may hang for minutes, and end the process, where no cluster answers.
    """
    where = f"cannot join the Ray cluster at {address}"
    _check_answers(address, where)
    command = [sys.executable, "-c", _PROBE, address]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as probe:
        try:
            _, said = probe.communicate(timeout=PROBE_S)
        except subprocess.TimeoutExpired:
            raise RunError(
                f"{where}: it did not let us in within {PROBE_S:.0f} s. Is that "
                "address one of a Ray cluster that this machine belongs to?"
            ) from None
        finally:  # also where Ctrl-C ends the wait
            with suppress(ProcessLookupError):
                os.killpg(probe.pid, signal.SIGKILL)
    if probe.returncode:
        raise RunError(f"{where}: {_reason(said)}")
    undo.callback(_leave)
    if refused := _init({"address": address}):
        raise RunError(f"{where}: {refused}")


def _init(settings: dict[str, Any]) -> str:
    """Have Ray begin; tell why it cannot, empty if it can."""
    with warnings.catch_warnings():
        # What Ray has started and given up it does not wait for.
        warnings.simplefilter("ignore", ResourceWarning)
        refused = _begin(settings)
        if refused:
            gc.collect()
    return refused


def _begin(settings: dict[str, Any]) -> str:
    try:
        ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **settings)
    except (Exception, SystemExit) as error:
        return _reason(str(error))
    return ""


def _leave() -> None:
    ray.shutdown()
    with suppress(AttributeError):  # of Ray's own; it may change
        core: Any = ray._raylet
        core.AuthenticationTokenLoader.instance().reset_cache()


def _reason(said: str) -> str:
    """Take from what Ray said why it did not work."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if "ersion mismatch" in line:
            told = " ".join(lines[number : number + 5])
            return f"{told} Install one version of Ray and of Python everywhere"
    last = lines[-1] if lines else "Ray ended without a word"
    if "grpc" in last and "No module" in last:
        return f"{last}. Addresses of ray:// need pip install 'ray[client]'"
    return last


def _check_answers(address: str, where: str) -> None:
    """Refuse an address at which nobody takes connections."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if address == "auto":
        return
    if not port.isdecimal() or not host:
        raise RunError(f"{where}: give auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"{where}: nobody answers there ({error}). Start it with: ray start --head"
        ) from error
