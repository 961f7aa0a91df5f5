"""A recording of a model so small that it takes a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoprune.latency.record import Order
from autoprune.latency.timing import Call, CpuTimer, Timing
from autoprune.latency.whole_models import Variation

TINY = Variation("dense", 64, 128, 4, 2, 16, 256, 3, dtype="float32")


class CountingTimer(CpuTimer):
    """Takes short times, and counts them."""

    def __init__(self) -> None:
        super().__init__(batch_ms=0.2, batches=2)
        self.taken = 0

    def time(self, calls: Sequence[Call], *, quick: bool = False) -> Timing:
        self.taken += 1
        return super().time(calls, quick=quick)


def tiny_order(folder: Path, **changes: Any) -> Order:
    chosen: dict[str, Any] = {
        "kind": "cpu",
        "folder": folder,
        "name": "tiny",
        "seconds": 60.0,
        "part": "kernels",
        "probe": True,
        "targets": {"tiny": TINY},
    }
    return Order(**(chosen | changes))
