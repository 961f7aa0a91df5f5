"""Tensors on disk: content-keyed safetensors with checksums, atomic, under a cap."""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoprune.errors import StoreError

log = logging.getLogger(__name__)

FILE_FORMAT = "2"
"""Version of the files."""

READABLE = ("1", FILE_FORMAT)
"""Versions that are read; others are made again. In the first, all parts are stored."""

ALIGNMENT = 64
"""Bytes that the first tensor is aligned to, as in memory: products do not differ."""

WAIT_S = 1800.0
"""How long a process waits for another one to make the same before it does so too."""

_ELSEWHERE = "Free space, or set AUTOPRUNE_CACHE to a folder on another disk"
_FACTS = "storage"
_PART = ".part"
_STALE_S = 3600
_TRIES = 3


@dataclass(frozen=True, eq=False)
class Content:
    """What a file holds.

    Attributes:
        tensors: Mapped from the file: they take memory only while they are used, and
            one time for all processes. They outlive the file. Not to be written to.
        facts: What was written with them.
    """

    tensors: dict[str, Tensor]
    facts: str


class TensorFiles:
    """A folder of files of tensors, safe for several processes.

    A file is written beside its place and moved there, so it is whole or absent; it is
    not forced to the disk, as a checksum tells what a power cut has left. A file that
    fails its checksum is removed and counts as absent, so that its content is made
    again. When the folder outgrows its cap, the files used longest ago go; where
    another process still has one of them mapped, its space is free when that lets go.
    A folder that is deleted meanwhile is made again.

    Args:
        folder: Where the files are; made if absent.
        cap_bytes: Most bytes that the files may take.
        what: What a file holds, for messages.

    Raises:
        StoreError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, cap_bytes: int, *, what: str) -> None:
        self.folder = folder
        self.cap_bytes = cap_bytes
        self.what = what
        self._since_scan: int | None = None  # bytes that are there, as far as we know
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot make the folder of {what}s {folder}: {error.strerror}. "
                f"{_ELSEWHERE}"
            ) from error

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def path(self, key: str) -> Path:
        """Tell where the file of a key is."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> Content | None:
        """Map a file, or give None if it is absent or was damaged.

        Raises:
            StoreError: If a file that is there cannot be read.
        """
        path = self.path(key)
        try:
            content = _read(path)
        except FileNotFoundError:
            return None  # somebody may have written it by now
        except (OSError, RuntimeError) as error:
            # Torch tells of a file that went meanwhile as RuntimeError.
            if "No such file" in str(error):
                return None
            raise StoreError(
                f"cannot read the {self.what} {path}: {error}. {_ELSEWHERE}"
            ) from error
        except SafetensorError as error:
            self.discard(key, str(error))
            return None
        self.touch(key)
        return content

    def write(
        self,
        key: str,
        tensors: Mapping[str, Tensor],
        *,
        facts: str = "",
        about: str = "",
    ) -> None:
        """Write a file.

        Args:
            key: Its content key.
            tensors: By name.
            facts: What else has to come back; covered by the checksum.
            about: What it is, for people who open the file.

        Raises:
            StoreError: If the disk is full or the folder cannot be written.
        """
        metadata = {
            "format": FILE_FORMAT,
            "about": about,
            _FACTS: facts,
            "sha256": checksum(tensors, facts),
        }
        content = safetensors.torch.save(dict(tensors), metadata)
        path = self.path(key)
        try:
            _place(path, content)
        except OSError as error:
            raise StoreError(
                f"cannot write a {self.what} of {len(content)} bytes to {path}: "
                f"{error.strerror}. {_ELSEWHERE}"
            ) from error
        self._count(len(content))

    def discard(self, key: str, reason: str) -> None:
        """Remove a file that is damaged, with a warning."""
        path = self.path(key)
        text = f"{self.what} file %s is damaged (%s): making it again"
        log.warning(text, path, reason)
        with suppress(OSError):  # a file that stays is found damaged again
            path.unlink()

    def touch(self, key: str) -> None:
        """Note that a file is in use: the time of last use decides what goes first."""
        with suppress(OSError):  # it may have gone meanwhile
            os.utime(self.path(key))

    @contextmanager
    def alone(self, key: str = "") -> Iterator[None]:
        """Keep other processes from making the same meanwhile.

        It saves work and no more: where the file system has no locks, or the other one
        takes longer than ``WAIT_S``, nobody is kept from anything.
        """
        lock = FileLock(self.folder / f"{key}.lock", timeout=WAIT_S)
        try:
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            log.debug("no lock in %s: %s", self.folder, error)
        try:
            yield
        finally:
            lock.release()

    def shrink(self) -> int:
        """Hold the cap: remove the files used longest ago; return their bytes.

        Called by ``write`` when the cap seems to be passed. Where it is, a tenth of it
        is made free, so that not every ``write`` has to look at all files. What killed
        processes have left half written goes as well.
        """
        removed = 0
        with self.alone():
            files = self._files()
            total = sum(stat.st_size for stat, _ in files)
            most = self.cap_bytes * (1 if total <= self.cap_bytes else 0.9)
            for stat, path in sorted(files, key=lambda item: item[0].st_mtime_ns):
                being_written = path.suffix == _PART
                stale = being_written and stat.st_mtime < time.time() - _STALE_S
                if stale or (total - removed > most and not being_written):
                    path.unlink(missing_ok=True)
                    removed += stat.st_size
        self._since_scan = total - removed
        if removed:
            log.info(
                "removed %.1f MB of %ss used longest ago", removed / 1e6, self.what
            )
        return removed

    def _count(self, size: int) -> None:
        """Take note of a new file; other processes' files are seen by the next scan."""
        if self._since_scan is None:  # one look at the folder a process
            self._since_scan = sum(stat.st_size for stat, _ in self._files())
        else:
            self._since_scan += size
        if self._since_scan > self.cap_bytes:
            self.shrink()

    def _files(self) -> list[tuple[os.stat_result, Path]]:
        files = []
        for path in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):  # another process has removed it
                files.append((path.stat(), path))
        return files


def checksum(tensors: Mapping[str, Tensor], facts: str = "") -> str:
    """Give the SHA-256 of tensors and of what is written with them."""
    total = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f";{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():  # torch cannot view nothing as bytes
            flat = tensor.flatten()
            if flat.numel() == 1:  # an expanded one counts as contiguous, at stride 0
                flat = flat.repeat(1)
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read(path: Path) -> Content:
    """Map and check a file; whatever is wrong inside of it is a SafetensorError."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.get("format") not in READABLE:
        raise SafetensorError(f"its format is {about.get('format')}")
    facts = about.get(_FACTS)
    if facts is None or about.get("sha256") != checksum(tensors, facts):
        raise SafetensorError("its checksum does not match")
    return Content(tensors, facts)


def _place(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there."""
    for left in reversed(range(_TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(suffix=_PART, dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    _write_aligned(file, content)
                os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            return
        except FileNotFoundError:  # the folder is being deleted
            if not left:
                raise


def _write_aligned(file: BinaryIO, content: bytes) -> None:
    """Write safetensors with spaces after the header, as the format allows."""
    header = int.from_bytes(content[:8], "little")
    spaces = -(8 + header) % ALIGNMENT
    file.write((header + spaces).to_bytes(8, "little"))
    file.write(content[8 : 8 + header] + b" " * spaces)
    file.write(memoryview(content)[8 + header :])
