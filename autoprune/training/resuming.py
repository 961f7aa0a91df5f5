"""The folder of a recovery: whose it is, and its last checkpoint."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.errors import RunError
from autoprune.exporting.digests import digest
from autoprune.training.moving_masks import MovingMasks

NAME = "recovery.json"
"""What a folder's recovery started from."""

WEIGHTS = "weights.safetensors"
"""What a checkpoint keeps of the model: all that training changes, in float32."""

MASKS = "masks.pt"
"""What a checkpoint keeps of masks that move."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def claim(folder: Path, identity: Mapping[str, str]) -> None:
    """Make a folder a recovery's own, or see that it is.

    Args:
        folder: The folder; made if it is not there.
        identity: All that the result depends on, by what it is.

    Raises:
        RunError: If another recovery began in it, or it cannot be read or written.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            part = path.with_name(f"{NAME}.{os.getpid()}.part")
            part.write_text(json.dumps(dict(identity), indent=2), encoding="utf-8")
            os.replace(part, path)
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot use {path} of a recovery: {error}") from error
    names = known.keys() | identity.keys()
    other = sorted(name for name in names if known.get(name) != identity.get(name))
    if other:
        raise RunError(
            f"{folder} belongs to a recovery that differs in {', '.join(other)}: there "
            f"{known.get(other[0])}, here {identity.get(other[0])}. Take another "
            "folder, or what that recovery began with."
        )


def check_room(place: Path, needed: float) -> None:
    """See that a disk has room for what a training writes.

    Args:
        place: A folder, which may be made later.
        needed: Bytes.

    Raises:
        RunError: If not.
    """
    there = next(path for path in (place, *place.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise RunError(
            f"checkpoints of the training take up to {needed / 1e9:.2f} GB, and "
            f"{there} has {free / 1e9:.2f} GB free. Free space, or set AUTOPRUNE_CACHE "
            "to a folder on another disk."
        )


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Give one short text for named tensors, which changes with every bit of them."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {digest(tensors[name])}\n".encode())
    return found.hexdigest()[:16]


def last_checkpoint(folder: Path) -> Path | None:
    """Find the last checkpoint that was written whole; None without one."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name))
    }
    return found[max(found)] if found else None


def keep_only(checkpoint: Path) -> None:
    """Remove the other checkpoints of a folder."""
    for path in checkpoint.parent.glob("checkpoint-*"):
        if path != checkpoint:
            shutil.rmtree(path, ignore_errors=True)


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write what training changes: trained parameters and buffers."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().contiguous().clone()
        for name, tensor in _trained(model).items()
    }
    save_file(tensors, folder / WEIGHTS)


@torch.no_grad()
def read_weights(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights on the model, bit by bit.

    Raises:
        RunError: If the checkpoint has other parameters.
    """
    wanted, found = _trained(model), load_file(folder / WEIGHTS)
    if wanted.keys() != found.keys():
        strange = sorted(wanted.keys() ^ found.keys())
        raise RunError(
            f"the checkpoint {folder} has other weights than the model trains: "
            f"{len(strange)} differ, first {strange[0]!r}. Remove it to start anew."
        )
    for name, tensor in wanted.items():
        tensor.copy_(found[name])


def write_masks(masks: MovingMasks, folder: Path) -> None:
    """Write where masks are on their way."""
    torch.save(masks.state_dict(), folder / MASKS)


def read_masks(masks: MovingMasks, folder: Path) -> None:
    """Let masks go on from where those of a checkpoint were.

    Raises:
        ModelError: If these were masks of other parameters.
    """
    masks.load_state_dict(torch.load(folder / MASKS, weights_only=True))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Give trained parameters, those that share one once, and what is kept beside."""
    kept = model.state_dict(keep_vars=True)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in kept}
    return {**parameters, **buffers}
