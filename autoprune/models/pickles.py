"""Turns a pickle that was asked for by name into a plain Hugging Face folder, once.

Only tensors and plain containers are read: a pickle that would run anything is refused.
"""

import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from autoprune.errors import ModelError
from autoprune.models.conversion import content_hash
from autoprune.models.loading import first_line, quiet

SUFFIXES = (".bin", ".pt", ".pth")
"""What files of pickled weights are called."""

_WEIGHTS = (*(f"*{suffix}" for suffix in SUFFIXES), "*.safetensors", "*.index.json")
"""What of the folder beside is not carried along."""


def convert_pickle(file: Path, cache: Path) -> Path:
    """Give the folder that a pickle was converted to; convert it if need be.

    Args:
        file: A state dict, in a folder with its ``config.json`` and tokenizer.
        cache: Where converted models are kept.

    Raises:
        ModelError: If it holds anything but tensors, does not fit its configuration,
            or the cache cannot be written.
    """
    config = file.parent / "config.json"
    if not config.is_file():
        raise ModelError(
            f"{file} lies in a folder without config.json, so nobody knows what model "
            "it is of. Put it beside its configuration and tokenizer."
        )
    name = f"{content_hash(file, cache)[:16]}-{content_hash(config, cache)[:16]}"
    folder = cache / "converted" / name
    if folder.is_dir():  # it got its name when it was whole
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part.", dir=folder.parent) as place:
            made = Path(place) / name
            with quiet():
                _read(file).save_pretrained(made)
            skip = shutil.ignore_patterns(*_WEIGHTS, "config.json")
            shutil.copytree(file.parent, made, ignore=skip, dirs_exist_ok=True)
            source = {"source": str(file.resolve()), "converted": "from a pickle"}
            (made / "SOURCE.json").write_text(json.dumps(source, indent=2) + "\n")
            if not folder.is_dir():  # another process may have been faster
                os.replace(made, folder)
    except OSError as error:
        raise ModelError(
            f"cannot keep a converted model in {folder.parent}: {error}. Free some "
            "space there, or let AUTOPRUNE_CACHE name another folder."
        ) from error
    return folder


def _read(file: Path) -> Any:
    """Read the model: tensors alone, and every one that it needs."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(
            f"{file} holds more than tensors, or is damaged: {first_line(error)}. It "
            "was not run. Save the weights as safetensors where they come from."
        ) from error
    try:
        config = AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or ["none named"])[0])
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    except Exception as error:  # a foreign reader on foreign bytes raises anything
        raise ModelError(
            f"transformers cannot make the model of {file.parent / 'config.json'} with "
            f"the weights in {file.name}: {first_line(error)}"
        ) from error
    if missing := sorted(map(str, info["missing_keys"])):
        raise ModelError(
            f"{file} lacks {len(missing)} weights of {type(model).__name__}, first "
            f"{missing[0]!r}"
        )
    return model
