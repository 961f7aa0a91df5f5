"""Room on the disk, for what a run still has to write."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from autoprune.errors import ConfigError
from autoprune.searching.plan import Plan

SPARE = 64 << 20
"""Bytes for the ledger, tables and what else is small."""


@dataclass(frozen=True)
class Room:
    """Watches that the disk keeps room for the end of a run.

    Attributes:
        folder: The run folder.
        needed: Bytes that have to stay free there.
    """

    folder: Path
    needed: int

    @classmethod
    def of(cls, plan: Plan, folder: Path, *, export: bool) -> "Room":
        """Tell what a run needs, and refuse it where there is less.

        Args:
            plan: Of the first round.
            folder: The run folder.
            export: Whether the winner will be exported: a dense model's bytes at most.

        Raises:
            ConfigError: If variants or the export do not fit on their disks.
        """
        bench = plan.bench
        missing = plan.bank.missing(plan.pairs)
        variants = sum(bench.actions.storage(*pair).nbytes for pair in missing)
        dense = bench.storages(bench.dense_policy())
        exported = bench.exporter.size_bytes(dense, bench.untouched) if export else 0
        for place, needed, what in (
            (bench.store.folder, variants + SPARE, "the variants of this space take"),
            (folder, exported + SPARE, "the run folder with its export takes"),
        ):
            free = shutil.disk_usage(place).free
            if free < needed:
                raise ConfigError(
                    f"{what} up to {needed / 1e9:.2f} GB, and {place} has "
                    f"{free / 1e9:.2f} GB free. "
                    "Free space, choose another disk, or allow fewer actions"
                )
        return cls(folder, exported + SPARE)

    def __call__(self) -> bool:
        """Tell whether there is room for another trial and for what comes after."""
        return shutil.disk_usage(self.folder).free >= self.needed
