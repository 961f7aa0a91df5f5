"""Loads models of transformers silently and strictly: every weight, or an error."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from autoprune.errors import ModelError, unknown_name

log = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and the warnings of transformers and its hub client.

    Both are settings of the whole process; they are put back as they were.
    """
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_bars:
            enable_progress_bars()
        else:
            disable_progress_bars()


def load_strictly(
    folder: Path, auto_class: str, *, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    """Load a model for reading: in ``eval`` mode and without gradients.

    transformers only warns where a checkpoint lacks weights, and draws them at random;
    here that is an error. Weights that the class has no place for are an error too,
    unless they belong to another head, such as the pooler that BERT was trained with.

    Args:
        folder: Where the files are.
        auto_class: Name of a class of transformers, such as ``AutoModelForCausalLM``.
        dtype: Type of all weights.
        **options: More arguments of ``from_pretrained``.

    Raises:
        ModelError: If transformers cannot read the model, or weights do not fit.
    """
    if not auto_class.startswith("AutoModel") or not hasattr(transformers, auto_class):
        known = [name for name in dir(transformers) if name.startswith("AutoModel")]
        raise ModelError(unknown_name("class of transformers", auto_class, known))
    try:
        with quiet():
            model, info = getattr(transformers, auto_class).from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with their shapes
                **{"trust_remote_code": False, **options},
            )
    except Exception as error:  # a foreign reader on foreign bytes raises anything
        raise ModelError(
            f"transformers {transformers.__version__} cannot load {folder} as "
            f"{auto_class}: {first_line(error)}. Check that the model is complete, "
            "unquantized and of an architecture that this class knows."
        ) from error
    _check_weights(model, info, folder)
    model.eval().requires_grad_(False)
    return model  # type: ignore[no-any-return]


def _check_weights(
    model: PreTrainedModel, info: Mapping[str, Any], folder: Path
) -> None:
    where = f"the weights in {folder} do not fit {type(model).__name__}"
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise ModelError(
            f"{where}: {name!r} has shape {list(found)}, config.json asks for "
            f"{list(wanted)} ({len(mismatched)} such). Use the config.json that "
            "belongs to these weights."
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{where}: {len(missing)} are missing, first {missing[0]!r}. Use a "
            "complete checkpoint, and the class that it was made for."
        )
    modules = {name for name, _ in model.named_modules()}
    unexpected = sorted(info["unexpected_keys"])
    if foreign := [name for name in unexpected if _alters(name, modules)]:
        raise ModelError(
            f"{where}: it has no place for {len(foreign)} of them, first "
            f"{foreign[0]!r}. Use the config.json that belongs to these weights."
        )
    if unexpected:
        log.info("%s: left out %d weights of another head", folder, len(unexpected))


def _alters(name: str, modules: set[str]) -> bool:
    """Tell a weight of some block, or of a module in use, from one of another head."""
    parts = name.split(".")
    return any(part.isdecimal() for part in parts) or ".".join(parts[:-1]) in modules


def first_line(error: Exception) -> str:
    """Name an error by its type and the first line of its message."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {line[:300].rstrip('.')}"
