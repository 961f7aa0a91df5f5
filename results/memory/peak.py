"""The most memory that a process takes for a piece of work. Linux only."""

import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

PERIOD_S = 0.002
"""Far less than a layer takes, so that no buffer of a solver is missed."""


class PeakMemory:
    """Watches what this process takes while a ``with`` block runs.

    All figures are above what there was at the start.

    Attributes:
        anon_bytes: Most memory of its own, which the system cannot take back. A thread
            reads it every few milliseconds, as the kernel keeps no peak of it.
        resident_bytes: Most memory with the mapped pages of files, which the system may
            drop whenever it likes. The kernel keeps this peak exactly.
    """

    anon_bytes = 0
    resident_bytes = 0

    def __enter__(self) -> Self:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets its peak
        self._begin = status()
        self._most = self._begin["RssAnon"]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.anon_bytes = self._most - self._begin["RssAnon"]
        self.resident_bytes = status()["VmHWM"] - self._begin["VmRSS"]

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD_S):
            self._most = max(self._most, status()["RssAnon"])


def status() -> dict[str, int]:
    """Read the bytes that this process takes, by the kernel's names."""
    text = Path("/proc/self/status").read_text()
    return {
        name: int(kilobytes) * 1024
        for name, kilobytes in re.findall(r"(\w+):\s+(\d+) kB", text)
    }
