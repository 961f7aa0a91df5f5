"""Finds a model by its name and loads it: a folder, a GGUF file, a hub id, the demo."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import platformdirs
import torch
from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel

from autoprune.errors import ModelError
from autoprune.models.conversion import content_hash, convert_demo, convert_gguf
from autoprune.models.loading import first_line, load_strictly, quiet
from autoprune.models.pickles import SUFFIXES, convert_pickle

DEMO = "demo"
"""The name that stands for SmolLM2-135M-Instruct."""

INDEX = "model.safetensors.index.json"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]
_HUB_COPIES = ["*/*", "consolidated*"]
"""What repositories hold beside: other formats, and the same weights once more."""

_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        source: As it was named.
        folder: A plain Hugging Face folder: configuration, safetensors, tokenizer.
        revision: 16 hexadecimal digits of the content of configuration and weights.
    """

    source: str
    folder: Path
    revision: str


def cache_dir() -> Path:
    """Give the folder of what can be made again: ``$AUTOPRUNE_CACHE`` or the user's."""
    given = os.environ.get("AUTOPRUNE_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("autoprune")


def resolve(source: str, *, cache: Path | None = None) -> Checkpoint:
    """Find a model, and fetch or convert it where that is needed.

    The demo and GGUF files are converted once, to bfloat16, into the cache; so is a
    pickle of weights, in its own types, if the file itself is named.

    Args:
        source: A local Hugging Face folder, a GGUF file, ``demo``, or the id of a model
            on the hub, ``owner/name``.
        cache: Where converted models are kept; ``cache_dir()`` by default.

    Raises:
        ModelError: If there is no such model, or it cannot be fetched, read or used.
    """
    cache = cache_dir() if cache is None else cache
    path = Path(source).expanduser()
    if source == DEMO:
        folder = convert_demo(cache)
    elif path.is_dir():
        folder = path.absolute()
    elif path.suffix == ".gguf" and path.is_file():
        folder = convert_gguf(path, cache)
    elif path.suffix in SUFFIXES and path.is_file():
        folder = convert_pickle(path, cache)
    elif path.exists():
        raise ModelError(
            f"{source!r} is a file but no GGUF file. Name the folder that holds "
            "config.json, a .gguf file, a hub id or 'demo'."
        )
    elif path.suffix != ".gguf" and _HUB_ID.fullmatch(source):
        folder = _download(source)
    else:
        near = " Did you mean 'demo'?" if get_close_matches(source, [DEMO]) else ""
        raise ModelError(
            f"there is no model {source!r}: no such file or folder (looked in "
            f"{Path.cwd()}).{near} Name a local Hugging Face folder, a GGUF file, a "
            "hub id such as 'HuggingFaceTB/SmolLM2-135M', or 'demo'."
        )
    files = _checked_files(folder)
    return Checkpoint(source, folder, _revision(files, cache))


def load_model(
    checkpoint: Checkpoint,
    auto_class: str = "AutoModelForCausalLM",
    *,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a checkpoint, in ``eval`` mode and without gradients.

    Silent, and strict: a missing weight is an error and never drawn at random. The
    weights are mapped from the file and copied only where they are written to, which
    never reaches the file.

    Args:
        checkpoint: From ``resolve``.
        auto_class: Name of the class of transformers to load it with.
        dtype: Type of all weights; None for the one that most of them are stored in.

    Raises:
        ModelError: If the class is unknown or the weights do not fit it.
    """
    if dtype is None:
        dtype = _stored_dtype(_checked_files(checkpoint.folder)[1:])
    return load_strictly(checkpoint.folder, auto_class, dtype=dtype)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        ModelError: If the folder has none, or one that cannot be read.
    """
    folder = checkpoint.folder
    kinds = ("tokenizer*", "vocab*", "*.model", "spiece*")
    if not any(path for kind in kinds for path in folder.glob(kind)):
        raise ModelError(
            f"{folder} has no tokenizer: no tokenizer.json, vocabulary or .model file. "
            "Copy the tokenizer's files there."
        )
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # a foreign reader on foreign bytes raises anything
        raise ModelError(
            f"transformers cannot load the tokenizer in {folder}: "
            f"{first_line(error)}. Copy the tokenizer's files there again."
        ) from error


def _download(name: str) -> Path:
    try:
        with quiet():
            return Path(
                snapshot_download(
                    name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES
                )
            )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"there is no folder {name!r}, and fetching the model of that id from "
            f"{constants.ENDPOINT} failed: {first_line(error)}. Check the id, HF_TOKEN "
            "and the network, or name a local folder, a GGUF file, or 'demo'."
        ) from error


def _checked_files(folder: Path) -> list[Path]:
    """Give a model's files, the configuration first, after checking what can be.

    Raises:
        ModelError: If a file is missing or damaged, or the model already compressed.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            f"{folder} is no Hugging Face model: it has no config.json. Name the "
            "folder that holds config.json and the safetensors files."
        )
    if quantization := _read_json(config).get("quantization_config"):
        method = quantization.get("quant_method", "some method")
        raise ModelError(
            f"{config} says that the weights are already quantized, with {method!r}. "
            "Start from the unquantized model."
        )
    weights = _weight_files(folder)
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size if file.exists() else "no"
            raise ModelError(
                f"{file} is missing or damaged ({error}; it has {size} bytes). Copy or "
                "download it again."
            ) from error
    return [config, *weights]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        names = set(_read_json(index).get("weight_map", {}).values())
        if names:
            return [folder / name for name in sorted(names)]
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    if pickles:
        raise ModelError(
            f"{folder} has its weights only in {pickles[0].name}, a pickle, which "
            "could run any program when read. Name that file itself if you want it: "
            "then its tensors are read, and nothing in it is run."
        )
    raise ModelError(
        f"{folder} has no weights: neither model.safetensors nor {INDEX} with files"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}. Copy it again.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} holds no JSON object, found {type(data).__name__}")
    return data


def _revision(files: Sequence[Path], cache: Path) -> str:
    hashes = hashlib.sha256()
    for file in files:
        hashes.update(f"{file.name} {content_hash(file, cache)}\n".encode())
    return hashes.hexdigest()[:16]


def _stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """Tell the type that most weights are stored in; the files' heads say it."""
    counts: dict[str, int] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                dtype = part.get_dtype()
                counts[dtype] = counts.get(dtype, 0) + prod(part.get_shape())
    floats = {name: count for name, count in counts.items() if name in _DTYPES}
    if not floats:
        raise ModelError(
            f"{files[0]} holds no weights in floating point, only {sorted(counts)}. "
            "Start from the unquantized model."
        )
    return _DTYPES[max(floats, key=lambda name: floats[name])]
