"""Variants on disk: content-keyed safetensors with checksums, atomic, under a cap."""

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoprune.compression.memory import WeightMemory, memory_bytes
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import StoreError

log = logging.getLogger(__name__)

STORE_FORMAT = "1"
"""Version of the files; other versions are made again."""

_ELSEWHERE = "Free space, or set AUTOPRUNE_CACHE to a folder on another disk"
_PART = ".part"
_STALE_S = 3600


DEFAULT_CAP_GB = 20.0
"""Most gigabytes of variants that the cache keeps, unless the user says otherwise."""


def cap_bytes() -> int:
    """Read the store's cap from ``AUTOPRUNE_STORE_GB``.

    Raises:
        StoreError: If it is no positive number.
    """
    text = os.environ.get("AUTOPRUNE_STORE_GB", str(DEFAULT_CAP_GB))
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < math.inf:
        raise StoreError(
            f"AUTOPRUNE_STORE_GB must be a positive number of gigabytes, found {text!r}"
        )
    return int(gigabytes * 1e9)


class VariantStore:
    """A folder of variants, safe for several processes.

    A file is written beside its place and moved there, so it is whole or absent; it is
    not forced to the disk, as a checksum tells what a power cut has left. A file that
    fails its checksum is removed and counts as absent, so that its variant is made
    again. When the folder outgrows its cap, the files used longest ago go.

    Args:
        folder: Where the files are; made if absent.
        cap_bytes: Most bytes that the files may take.

    Attributes:
        memory: Unpacked weights that are held beside the files.

    Raises:
        StoreError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        self.folder = folder
        self.memory = WeightMemory(memory_bytes())
        self.cap_bytes = cap_bytes
        self._since_scan: int | None = None  # bytes that are there, as far as we know
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot make the folder of variants {folder}: {error.strerror}. "
                f"{_ELSEWHERE}"
            ) from error

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def get(self, key: str) -> Variant | None:
        """Read a variant, or None if it is absent or was damaged.

        Raises:
            StoreError: If a file that is there cannot be read.
        """
        path = self._path(key)
        try:
            storage, parts = _read(path)
        except (OSError, RuntimeError) as error:
            if not path.exists():  # torch tells of a file that is gone as RuntimeError
                return None
            raise StoreError(
                f"cannot read the variant {path}: {error}. {_ELSEWHERE}"
            ) from error
        except SafetensorError as error:
            log.warning("variant file %s is damaged (%s): making it again", path, error)
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # it may have gone meanwhile
            os.utime(path)  # the time of last use, which decides what goes first
        return Variant.unpack(storage, parts)

    def put(self, key: str, variant: Variant, *, about: str = "") -> None:
        """Write a variant.

        Args:
            key: Its content key.
            variant: The variant.
            about: What it is, for people who open the file.

        Raises:
            StoreError: If the disk is full or the folder cannot be written.
        """
        parts = variant.pack()
        storage = json.dumps(asdict(variant.storage))
        metadata = {
            "format": STORE_FORMAT,
            "about": about,
            "storage": storage,
            "sha256": _checksum(parts, storage),
        }
        path = self._path(key)
        content = safetensors.torch.save(parts, metadata)
        try:
            path.parent.mkdir(exist_ok=True)
            descriptor, name = tempfile.mkstemp(suffix=_PART, dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StoreError(
                f"cannot write a variant of {len(content)} bytes to {path}: "
                f"{error.strerror}. {_ELSEWHERE}"
            ) from error
        self._count(len(content))

    def shrink(self) -> int:
        """Hold the cap: remove the files used longest ago; return their bytes.

        Called by ``put`` when the cap seems to be passed. Where it is, a tenth of it is
        made free, so that not every ``put`` has to look at all files. What killed
        processes have left half written goes as well.
        """
        removed = 0
        with FileLock(self.folder / ".lock"):
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
            log.info("removed %.1f MB of variants used longest ago", removed / 1e6)
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

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _read(path: Path) -> tuple[Storage, dict[str, Tensor]]:
    """Read and check a file; whatever is wrong inside of it is a SafetensorError."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.get("format") != STORE_FORMAT:
        raise SafetensorError(f"its format is {about.get('format')}")
    storage = about.get("storage", "")
    if about.get("sha256") != _checksum(parts, storage):
        raise SafetensorError("its checksum does not match")
    fields = json.loads(storage)
    return Storage(**fields | {"shape": tuple(fields["shape"])}), parts


def _checksum(parts: Mapping[str, Tensor], storage: str) -> str:
    total = hashlib.sha256(storage.encode())
    for name in sorted(parts):
        tensor = parts[name].contiguous()
        total.update(f";{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():  # torch cannot view nothing as bytes
            total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
