"""The recoveries of a phase, one after the other, and what each leaves on disk.

So that a process that was killed begins where the last of them had ended, or within one
from its own checkpoint.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.compression.parameters import Settings
from autoprune.errors import ConfigError, RunError
from autoprune.training.masks import FrozenMasks
from autoprune.training.recovery import Pupil, RecoveryMethod, Told

KEPT_BYTES = 5.0
"""What is kept of each recovery that has ended, a weight: it in float32, and a mask."""


def recover_in_turn(
    pupil: Pupil,
    recoveries: Sequence[tuple[RecoveryMethod, Settings]],
    folder: Path,
    *,
    share: float,
    where: str,
    told: Told,
) -> None:
    """Do one recovery after the other, or read what one has left.

    Args:
        pupil: What is trained, in place.
        recoveries: With complete parameters.
        folder: Of this phase alone.
        share: Of each one's tokens.
        where: Which phase of which course this is, for errors.
        told: Hears how far it is.

    Raises:
        ConfigError: If a recovery cannot do what it is asked for; says in which phase.
        RunError: If what one leaves cannot be written.
    """
    for place, (recovery, settings) in enumerate(recoveries):
        own = folder / f"{place}-{recovery.name}"
        kept = folder / f"{own.name}.safetensors"
        if kept.exists():
            _put_trained(pupil.model, pupil.masks, load_file(kept))
            continue

        def part(share: float, place: int = place) -> None:
            told((place + share) / len(recoveries))

        try:
            recovery.recover(pupil, settings, share=share, folder=own, told=part)
        except ConfigError as error:
            raise ConfigError(
                f"in {where}, with {share:.3g} of its tokens: {error}"
            ) from error
        _keep(_trained_of(pupil.model, pupil.parameters, pupil.masks), kept)
        shutil.rmtree(own, ignore_errors=True)


def _keep(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors whole, or not at all."""
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"cannot write what was trained to {path}: {error}. Make room and start "
            "again: it goes on from the last checkpoint."
        ) from error


_PRUNED = "pruned: "
"""Stands before a parameter's name where its mask is written."""


def _trained_of(
    model: nn.Module, names: Sequence[str], masks: FrozenMasks
) -> dict[str, Tensor]:
    """Give some parameters by name, and what is pruned, ready to be written."""
    found = {name: model.get_parameter(name).detach().contiguous() for name in names}
    return found | {_PRUNED + name: mask for name, mask in masks.parameters()}


@torch.no_grad()
def _put_trained(
    model: nn.Module, masks: FrozenMasks, tensors: Mapping[str, Tensor]
) -> None:
    """Put parameters on a model that were written before, and replace its masks."""
    for name, tensor in tensors.items():
        if not name.startswith(_PRUNED):
            model.get_parameter(name).copy_(tensor)
    masks.replace(
        {
            name.removeprefix(_PRUNED): tensor
            for name, tensor in tensors.items()
            if name.startswith(_PRUNED)
        }
    )
