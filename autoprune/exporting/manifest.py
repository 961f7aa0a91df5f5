"""What an export consists of: ``MANIFEST.json``, by which anyone can check it.

It names every file with its size and SHA-256, every layer with the digest of its
weight, what the model said on a few windows of tokens, and where all of it came from.
"""

import hashlib
import json
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoprune.errors import ExportError

MANIFEST = "MANIFEST.json"
"""Its name."""

MANIFEST_FORMAT = 1
"""Version of its schema; a reader refuses a newer one."""

_SEAL = "sha256"
"""Key of the hash of everything else in the file."""

_AGAIN = "Copy the folder again, or export the model again."

_KEYS = {"format": int, "target": str, "task": str, "files": dict, "layers": dict}


def write_manifest(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder that is otherwise whole.

    Args:
        folder: The export.
        about: What else joins it; plain data.

    Returns:
        All that it holds.
    """
    files = {
        name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for name, path in _files(folder).items()
        if name != MANIFEST
    }
    data = {**about, "format": MANIFEST_FORMAT, "files": files}
    data[_SEAL] = _seal(data)
    text = json.dumps(data, indent=1, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return data


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of an export and check it, but none of the files.

    Raises:
        ExportError: If it is missing, damaged, changed, or newer than this reader.
    """
    file = folder / MANIFEST
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(
            f"cannot read {file}: {error.strerror}. Name a folder that 'autoprune "
            f"export' has written; one without {MANIFEST} was never finished"
        ) from error
    except ValueError as error:
        raise ExportError(f"{file} is damaged: {error}. {_AGAIN}") from error
    if not isinstance(data, dict):
        raise ExportError(f"{file} is damaged: it holds no JSON object. {_AGAIN}")
    found = data.get("format")
    if isinstance(found, int) and found > MANIFEST_FORMAT:
        raise ExportError(
            f"{file} has format {found}, this AutoPrune reads up to {MANIFEST_FORMAT}. "
            "Update AutoPrune."
        )
    for key, kind in _KEYS.items():
        if not isinstance(data.get(key), kind):
            raise ExportError(
                f"{file} is damaged: {key!r} is {data.get(key)!r}, expected "
                f"{kind.__name__}. {_AGAIN}"
            )
    if data.get(_SEAL) != (seal := _seal(data)):
        raise ExportError(
            f"{file} was changed after it was written: its content has SHA-256 {seal}, "
            f"it says {data.get(_SEAL)!r}. {_AGAIN}"
        )
    return data


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare a folder with its manifest, file by file.

    Names that begin with a dot are not looked at: tools that copy folders leave such.

    Raises:
        ExportError: If a file is missing, is another than was written, or was added;
            tells all of them.
    """
    found, wanted = _files(folder), manifest["files"]
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    for name, entry in wanted.items():
        if name not in found:
            continue
        size = found[name].stat().st_size
        if size != entry["bytes"]:
            wrong.append(f"{name} has {size} bytes, written were {entry['bytes']}")
        elif (sha256 := file_sha256(found[name])) != entry["sha256"]:
            wrong.append(f"{name} has SHA-256 {sha256}, written was {entry['sha256']}")
    added = found.keys() - wanted.keys() - {MANIFEST}
    wrong += [f"{name} was not written by AutoPrune" for name in sorted(added)]
    if wrong:
        raise ExportError(
            f"the export {folder} is not what was written: {'; '.join(wrong)}. {_AGAIN}"
        )


def file_sha256(file: Path) -> str:
    """Give the SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def command_line() -> str:
    """Tell how the process was called, without where its program lies."""
    program, *rest = sys.argv or [""]
    return shlex.join([Path(program).name, *rest])


def finite(data: Any) -> Any:
    """Replace numbers that JSON has no word for, as a diverged model gives, by null."""
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _files(folder: Path) -> dict[str, Path]:
    """Find all files below a folder, by their path in it."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {
        inner.as_posix(): path
        for inner, path in paths.items()
        if path.is_file() and not any(part.startswith(".") for part in inner.parts)
    }


def _seal(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != _SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
