"""A worker: evaluates in a process of its own, for a driver at the other end of a pipe.

``python -c "from autoprune.searching.worker import main; main()" FD`` serves the
connection whose descriptor is FD.
"""

import logging
import os
import pickle
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Ready:
    """The worker has done what a recipe says, and takes jobs."""


@dataclass(frozen=True, eq=False)
class Refused:
    """The worker cannot do what a recipe says."""

    error: Exception


@dataclass(frozen=True, eq=False)
class Done:
    """A job has ended: with a result, or with an error."""

    result: Any = None
    error: Exception | None = None


def main() -> None:
    """Serve the connection that the last argument names, until its other end closes."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    connection: Connection[Any, Any] = Connection(int(sys.argv[-1]))
    asked: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_listen, args=(connection, asked), daemon=True).start()
    serve(connection, asked)


def serve(connection: "Connection[Any, Any]", asked: "SimpleQueue[Any]") -> None:
    """Do what is asked for, one thing after the other."""
    import torch

    from autoprune.searching.memory_limit import hold_memory
    from autoprune.searching.recipe import Kitchen, Recipe

    kitchen, evaluator = Kitchen(), None
    while True:
        message = asked.get()
        if isinstance(message, Recipe):
            torch.set_num_threads(message.threads)
            if message.memory is not None:
                hold_memory(message.memory)
            try:
                evaluator = kitchen.make(message)
            except Exception as error:
                log.exception("cannot evaluate for this run")
                connection.send(Refused(sendable(error)))
            else:
                connection.send(Ready())
            continue
        try:
            done = Done(message.run(evaluator))
        except Exception as error:
            log.exception("a job failed")
            done = Done(error=sendable(error))
        connection.send(done)


def sendable(error: Exception) -> Exception:
    """Give an error that can be sent: itself, or one that says the same."""
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:
        again = None
    if type(again) is type(error) and str(again) == str(error):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _listen(connection: "Connection[Any, Any]", asked: "SimpleQueue[Any]") -> None:
    """Take in what is asked for; end the process when the driver is gone."""
    try:
        while True:
            asked.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # nobody is left whom a result would reach
