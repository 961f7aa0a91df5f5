"""Makes an export folder, whole or not at all, and loads one.

A folder is assembled under another name and moved when it is whole, so that what bears
the final name is always finished, and an export that it replaces stays until then.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from autoprune.errors import ExportError
from autoprune.exporting.exporter import Exporter, ExportJob
from autoprune.exporting.manifest import command_line, finite, write_manifest
from autoprune.exporting.marker import exporter_of
from autoprune.exporting.verification import Expected, Verification, verify_export
from autoprune.models.loading import quiet
from autoprune.plugins import load_plugins
from autoprune.policy import Policy

Check = Callable[[Path, Expected], Verification]
"""Compares a folder with what it has to be, or raises ``ExportError``."""

POLICY_FILE = "policy.json"
CARD_FILE = "README.md"

_ORIGIN = ("target", "model", "versions", "seed", "splits", "text", "verified")
"""What the manifest repeats of ``policy.json``."""

_KEPT = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*")
"""Files of the dense model that an export carries on as they are."""


def write_export(
    exporter: Exporter,
    job: ExportJob,
    folder: Path,
    *,
    policy: Policy,
    tokenizer: Any,
    expected: Expected,
    record: Mapping[str, Any],
    card: Callable[[Mapping[str, Any]], str],
    check: Check = verify_export,
    force: bool = False,
) -> Verification | None:
    """Write an export: model, tokenizer, ``policy.json``, model card and manifest.

    A folder that its check refuses keeps ``.failed`` behind its name, and replaces
    nothing.

    Args:
        exporter: The target.
        job: What is exported.
        folder: Where; its parents are made if need be.
        policy: The policy, for ``policy.json``.
        tokenizer: The model's tokenizer.
        expected: What the export has to be; the layers' digests join it.
        record: What applying the policy again needs, and the figures; plain data that
            joins the policy in ``policy.json``.
        card: Makes the model card of what ``policy.json`` holds.
        check: Verifies the folder, in a fresh process, before it gets its name.
        force: Replace an export that is there already.

    Returns:
        What the fresh process found; None where there are no weights to load.

    Raises:
        ExportError: If the folder exists, the disk is full, the size is not the
            predicted one, or the folder, loaded again, is not what was exported.
    """
    folder, size_bytes = folder.absolute(), expected.size_bytes
    check_free(folder, force=force)
    with _scratch(folder, size_bytes) as made:
        expected = replace(expected, digests=exporter.write(made, job))
        found = exporter.written_bytes(made)
        tokenizer.save_pretrained(made)
        _copy_kept(job.checkpoint.folder, made)
        for file in made.glob("*.safetensors"):
            file.chmod(0o644)  # they are written for the owner only
        try:
            if found != size_bytes:
                raise ExportError(
                    f"the weight files in {made} have {found} bytes, but the exporter "
                    f"{exporter.name!r} had predicted {size_bytes}"
                )
            verified = check(made, expected) if exporter.weights else None
        except ExportError as error:
            failed = _keep_failed(made, folder)
            reason = str(error).replace(str(made), str(failed))
            raise ExportError(f"{reason}. What was written is in {failed}") from error
        data = _about(exporter, job, policy=policy, record=record, size_bytes=found)
        data["verified"] = asdict(verified) if verified else None
        data = finite(data)
        text = json.dumps(data, indent=1, allow_nan=False)
        (made / POLICY_FILE).write_text(text + "\n", encoding="utf-8")
        (made / CARD_FILE).write_text(card(data), encoding="utf-8")
        origin = {key: data[key] for key in _ORIGIN if key in data}
        origin |= {
            "weights": exporter.weights,
            "policy": policy.to_dict(),
            "command": command_line(),
        }
        write_manifest(made, finite(origin | expected.to_dict()))
        _move(made, folder)
    return verified


def load(folder: str | Path, *, plugins: Sequence[str] = ()) -> Any:
    """Load an export as a model that is called as those of transformers are.

    A plain Hugging Face folder loads as well, as a causal language model.

    Args:
        folder: What ``autoprune export`` has written.
        plugins: Modules to load beside the installed plugins.

    Raises:
        ExportError: If the folder is no export, or damaged.
        PluginError: If the plugin of its target is not there.
    """
    folder = Path(folder)
    return exporter_of(folder, load_plugins(plugins)).load(folder)


def check_free(folder: Path, *, force: bool) -> None:
    """Refuse a place that is taken.

    Raises:
        ExportError: If it is.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not force:
        raise ExportError(
            f"{folder} exists already. Name another folder, or replace it with --force"
        )
    if not (folder / POLICY_FILE).is_file():
        raise ExportError(
            f"{folder} is no export (it has no {POLICY_FILE}), so --force does not "
            "replace it. Name another folder, or remove it yourself"
        )


@contextmanager
def _scratch(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Give an empty folder beside the final place; removed afterwards.

    Raises:
        ExportError: If the disk is too full, or writing fails.
    """
    place = folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        _check_space(place, size_bytes)
        with (
            tempfile.TemporaryDirectory(
                prefix=f".{folder.name}.", suffix=".part", dir=place
            ) as scratch,
            quiet(),
        ):
            made = Path(scratch) / folder.name
            made.mkdir()  # with the usual rights, which a temporary folder lacks
            yield made
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(place).free if place.is_dir() else 0
        raise ExportError(
            f"cannot write the export {folder}: {error}. It needs {size_bytes} bytes, "
            f"{free} are free there. Free some space, or name another folder"
        ) from error


def _check_space(place: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(place).free
    if free < size_bytes:
        raise ExportError(
            f"the disk of {place} is too full: the export needs {size_bytes} bytes, "
            f"{free} are free. Free some space, or name a folder on another disk"
        )


def _copy_kept(source: Path, made: Path) -> None:
    for pattern in _KEPT:
        for file in source.glob(pattern):
            shutil.copy(file, made)


def _about(
    exporter: Exporter,
    job: ExportJob,
    *,
    policy: Policy,
    record: Mapping[str, Any],
    size_bytes: int,
) -> dict[str, Any]:
    """Gather what ``policy.json`` holds beside the policy."""
    model = {
        "source": job.checkpoint.source,
        "revision": job.checkpoint.revision,
        "licence": licence_of(job.checkpoint.folder),
        "auto_class": job.auto_class,
        **record.get("model", {}),
    }
    return {
        **policy.to_dict(),
        **record,
        "model": model,
        "target": exporter.name,
        "size_bytes": size_bytes,
        "loads_in": exporter.loads_in,
        "usage": exporter.usage("FOLDER", job.auto_class),
        "notes": exporter.notes(job.storages),
        "summary": _summary(job, policy),
    }


def _summary(job: ExportJob, policy: Policy) -> list[dict[str, Any]]:
    """Count sites, layers and weights by action, the most weights first."""
    rows: dict[str, dict[str, Any]] = {}
    sites = job.inventory.sites_for(policy)
    actions = policy.per_layer(sites)
    for site in sites:
        # A policy may name the layers of a site one by one.
        apart = [(layer,) for layer in site.layers]
        for layers in [site.layers] if site.name in policy else apart:
            action = str(actions[layers[0]])
            empty = dict.fromkeys(("sites", "layers", "weights", "bytes"), 0)
            row = rows.setdefault(action, {"action": action, **empty})
            row["sites"] += 1
            row["layers"] += len(layers)
            row["weights"] += sum(layer.numel for layer in layers)
            row["bytes"] += sum(job.storages[layer].nbytes for layer in layers)
    return sorted(rows.values(), key=lambda row: -row["weights"])


def licence_of(folder: Path) -> str | None:
    """Find the licence that a model's folder names, or None.

    Model cards name it in the lines between ``---`` at their start; a model that
    AutoPrune has converted, in ``SOURCE.json``.
    """
    card, source = folder / "README.md", folder / "SOURCE.json"
    try:
        if source.is_file():
            found = json.loads(source.read_text(encoding="utf-8")).get("licence")
            return str(found).lower() if found else None
        head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        found = yaml.safe_load(head[1]).get("license") if head else None
        return found if isinstance(found, str) else None
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None  # a card is for people and may hold anything


def _keep_failed(made: Path, folder: Path) -> Path:
    """Move what did not pass to a name that says so; return it."""
    failed = folder.with_name(f"{folder.name}.failed")
    if failed.is_dir() and (failed / "config.json").is_file():
        shutil.rmtree(failed)
    if failed.exists():
        failed = Path(tempfile.mkdtemp(prefix=f"{failed.name}.", dir=folder.parent))
    os.replace(made, failed)
    return failed


def _move(made: Path, folder: Path) -> None:
    """Give a whole folder its name; an old one goes only when the new one is there."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(made, folder)
        return
    old = made.with_name("old")  # in the scratch folder, which is removed
    os.replace(folder, old)
    try:
        os.replace(made, folder)
    except BaseException:
        os.replace(old, folder)
        raise
