"""What the dense model made of a split, kept on disk and mapped by all processes."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.files import TensorFiles, checksum
from autoprune.compression.store import VariantStore
from autoprune.errors import StoreError
from autoprune.evaluation.quality import Quality
from autoprune.models.task import Batch, Task
from autoprune.policy import digest

log = logging.getLogger(__name__)

TEACHER_VERSION = 1
"""Raised when a teacher remembers something else, or makes it in another way."""

CAP_SHARE = 0.1
"""Share of the cap of variants that teachers may take beside them."""


@dataclass(frozen=True, eq=False)
class Remembered:
    """What the dense model made of all scored positions, window after window.

    Attributes:
        features: What its head reads, ``d``.
        expected: ``sum p W``.
        cross: ``(sum p W) d``.
        log_sum: ``logsumexp(W d + b)``.
        kl: Of each window, to itself: 0 but for rounding.
        nll: Loss of each window.
    """

    features: Float[Tensor, "positions hidden"]
    expected: Float[Tensor, "positions hidden"]
    cross: Float[Tensor, " positions"]
    log_sum: Float[Tensor, " positions"]
    kl: Float[Tensor, " windows"]
    nll: Float[Tensor, " windows"]

    @property
    def quality(self) -> Quality:
        """The dense model's own quality."""
        return Quality(self.kl, self.nll)


class TeacherCache:
    """Teachers of one model on disk; see ``TensorFiles``.

    A teacher depends on the model, on what it reads and scores, on how many windows
    pass it together and, to the last bit, on the software, the kind of processor and
    the number of threads. All of that is its key, so that a measurement does not depend
    on whether its teacher was read or made.

    Where a teacher cannot be written or read, each process holds its own.

    Args:
        folder: Where the files are; made if absent.
        cap_bytes: Most bytes that they may take.
        revision: Name of the model's content.

    Raises:
        StoreError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, cap_bytes: int, revision: str) -> None:
        self.files = TensorFiles(folder, cap_bytes, what="teacher")
        self.revision = revision

    @classmethod
    def beside(cls, store: VariantStore, revision: str) -> Self:
        """Open the cache that belongs to a store of variants."""
        cap = int(CAP_SHARE * store.cap_bytes)
        return cls(store.folder.parent / "teachers", cap, revision)

    def key(self, task: Task, whole: Batch, *, dtype: torch.dtype, batch: int) -> str:
        """Name a teacher by all that it depends on.

        Args:
            task: What the model is for.
            whole: All windows of the split.
            dtype: What the model computes in.
            batch: Windows that pass the model at a time.
        """
        packages = [version(name) for name in ("autoprune", "torch", "transformers")]
        processor = torch.backends.cpu.get_cpu_capability()
        machine = [*packages, processor, torch.get_num_threads()]
        kind = [task.name, type(task).__module__, type(task).__qualname__]
        how = [*kind, str(dtype), batch, _content(whole)]
        return digest([TEACHER_VERSION, self.revision, *how, *machine])

    def get(self, key: str, make: Callable[[], Remembered]) -> Remembered:
        """Map a teacher; where it is absent, one process makes it and others wait."""
        try:
            found = self._read(key)
            if found is not None:
                return found
            with self.files.alone(key):
                return self._read(key) or self._made(key, make())
        except StoreError as error:
            log.warning("%s. This process holds its own", error)
            return make()

    def _made(self, key: str, made: Remembered) -> Remembered:
        """Write a teacher; give it as it is mapped, so that memory is let go."""
        try:
            self.files.write(key, _tensors(made))
            return self._read(key) or made
        except StoreError as error:
            log.warning("%s. This process holds its own", error)
            return made

    def _read(self, key: str) -> Remembered | None:
        content = self.files.read(key)
        return None if content is None else Remembered(**content.tensors)


def _tensors(made: Remembered) -> dict[str, Tensor]:
    names = [field.name for field in fields(made)]  # asdict would copy them
    return {name: getattr(made, name).contiguous() for name in names}


def _content(batch: Batch) -> str:
    """Give a checksum of all that the model reads of a split, and is asked of it."""
    parts = {**batch.inputs, "scored": batch.scored, "labels": batch.labels}
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    rest = {name: repr(parts[name]) for name in sorted(parts) if name not in tensors}
    return checksum(tensors, json.dumps(rest))
