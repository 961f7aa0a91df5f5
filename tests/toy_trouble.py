"""A plugin whose metric makes trouble in workers, never in the process of the tests.

The variable ``TROUBLE`` says which, as ``kill``, ``hang``, ``memory``, ``exit``; it
comes where the first block's q, k, v are stored with 3 bits. ``TROUBLE_SPARES`` is the
process that is left alone. Where processes live longer than a test, ``TROUBLE_FILE``
names a file that says it. ``nap`` comes everywhere, and only takes time.
"""

import os
import signal
import time
from pathlib import Path

from autoprune.evaluation.metric import Evidence, Metric
from autoprune.hookspecs import hookimpl

BITS = 3


class Trouble(Metric):
    """Zero, if it returns."""

    name = "trouble"
    unit = ""
    direction = "minimize"
    needs_model = True

    def measure(self, evidence: Evidence) -> float:
        kind = _kind()
        spared = os.environ.get("TROUBLE_SPARES") == str(os.getpid())
        if kind == "nap" and not spared:
            time.sleep(0.5)
        elif kind and not spared and _meets(evidence):
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "hang":
                time.sleep(3600)
            elif kind == "exit":
                os._exit(7)
            raise MemoryError("cannot allocate 1 TB")
        return 0.0


def _kind() -> str | None:
    path = Path(os.environ.get("TROUBLE_FILE", "/nowhere"))
    return path.read_text() if path.exists() else os.environ.get("TROUBLE")


def _meets(evidence: Evidence) -> bool:
    return any(
        storage.bits == BITS
        for layer, storage in evidence.storages.items()
        if layer.block == 0 and "q_proj" in layer.name
    )


@hookimpl
def register_metrics() -> list[Metric]:
    return [Trouble()]
