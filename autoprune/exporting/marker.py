"""The small file that says how to read an export: ``autoprune.json``."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autoprune.errors import ExportError
from autoprune.exporting.exporter import Exporter
from autoprune.plugins import Plugins

MARKER = "autoprune.json"
"""Its name."""

PLAIN = "transformers"
"""The target whose folders need no marker: what every tool writes and reads."""

EXPORT_FORMAT = 2
"""Version of what exporters write; a reader refuses a newer one."""

_AGAIN = "Copy the folder again, or export the model again."


def write_marker(folder: Path, *, target: str, **more: Any) -> None:
    """Write the marker.

    Args:
        folder: Where.
        target: Name of the exporter that wrote the folder.
        **more: What else that exporter needs to read it; plain data.
    """
    data = {
        "format": EXPORT_FORMAT,
        "target": target,
        "autoprune": version("autoprune"),
        **more,
    }
    (folder / MARKER).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_marker(
    folder: Path, *, target: str | None = None, needs: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Read the marker and check it.

    Args:
        folder: Where.
        target: Name of the exporter that reads; None for any.
        needs: Keys that have to be there, each with the type of its value.

    Raises:
        ExportError: If it is missing, damaged, newer than this reader, or of another
            target.
    """
    file = folder / MARKER
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(
            f"cannot read {file}: {error.strerror}. Name a folder that "
            "'autoprune export' has written."
        ) from error
    except ValueError as error:
        raise ExportError(
            f"{file} is damaged: {error}. Export the model again."
        ) from error
    wanted = {"format": int, "target": str, **(needs or {})}
    if not isinstance(data, dict):
        raise ExportError(
            f"{file} is damaged: it holds {data!r}. Export the model again."
        )
    if isinstance(data.get("format"), int) and data["format"] > EXPORT_FORMAT:
        raise ExportError(
            f"{file} has format {data['format']}, this AutoPrune reads up to "
            f"{EXPORT_FORMAT}. Update AutoPrune."
        )
    if target is not None and data.get("target", target) != target:
        raise ExportError(
            f"{file} is of the target {data['target']!r}, not {target!r}. Read the "
            "folder with autoprune.load, which finds the target by itself."
        )
    for key, kind in wanted.items():
        if not isinstance(data.get(key), kind):
            raise ExportError(
                f"{file} is damaged: {key!r} is {data.get(key)!r}, expected "
                f"{kind.__name__}. {_AGAIN}"
            )
    return data


def exporter_of(folder: Path, plugins: Plugins) -> Exporter:
    """Find the exporter that reads a folder; plain Hugging Face folders have one, too.

    Raises:
        ExportError: If the folder is no export.
        PluginError: If the plugin of its target is not there.
    """
    if not folder.is_dir():
        raise ExportError(
            f"there is no folder {str(folder)!r} (looked in {Path.cwd()}). Name a "
            "folder that 'autoprune export' has written."
        )
    plain = not (folder / MARKER).exists() and (folder / "config.json").exists()
    target = PLAIN if plain else read_marker(folder)["target"]
    exporter: Exporter = plugins.get("exporters", target)
    return exporter
