"""Disks that are really full: file systems in memory, of as many bytes as needed."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount an empty file system of some bytes; skip the test if nobody may."""
    folder.mkdir(parents=True)
    what = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(["mount", *what], capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode:
        pytest.skip(f"mounting is not allowed: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:  # lazily: what is still mapped from it stays until it is let go
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
