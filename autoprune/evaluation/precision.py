"""Chooses the type to compute in: bfloat16 where it is fast and agrees with float32."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.models.computing import computing_in
from autoprune.models.task import Task
from autoprune.models.text import TokenWindows
from autoprune.policy import digest

log = logging.getLogger(__name__)

AGREEMENT = 0.001
"""Largest relative difference in perplexity at which bfloat16 is taken."""

WINDOWS = 16
"""Windows of the comparison: of one, a bfloat16 perplexity may differ by 0.4 %."""

BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")
"""Capabilities with which bfloat16 beats float32; AVX-512 alone by 2.4 (measured)."""

_OVERFLOW = 100.0
"""A difference in loss beyond which no exponential is taken."""


def fast_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware: AMX or AVX-512."""
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(unit, False)) for unit in BFLOAT16_UNITS)


def choose_compute_dtype(
    task: Task,
    model: nn.Module,
    windows: TokenWindows,
    *,
    tokenizer: Any,
    cache: Path,
    revision: str,
    fast: bool | None = None,
) -> torch.dtype:
    """Choose the type to compute in on a CPU.

    bfloat16 where it is fast and the dense model's perplexity agrees with float32
    within 0.1 % on up to 16 windows; else float32. The verdict is remembered.

    Args:
        task: What the model is for.
        model: The dense model as stored; left as it was.
        windows: Tokens to compare on.
        tokenizer: The model's tokenizer.
        cache: Folder in which the verdict is remembered.
        revision: Name of the model's content.
        fast: Whether bfloat16 is fast here; None to ask the CPU.
    """
    if not (fast_bfloat16() if fast is None else fast):
        return torch.float32
    key = digest([revision, task.name, windows.fingerprint])
    memory = cache / "precision" / f"{key}.json"
    difference = _remembered(memory)
    if difference is None:
        difference = bfloat16_difference(task, model, windows, tokenizer=tokenizer)
        log.info("bfloat16 differs by %.3f %% in perplexity", 100 * difference)
        memory.parent.mkdir(parents=True, exist_ok=True)
        fresh = memory.with_suffix(f".{os.getpid()}.part")
        fresh.write_text(json.dumps({"difference": difference}))
        fresh.replace(memory)
    return torch.bfloat16 if difference <= AGREEMENT else torch.float32


def bfloat16_difference(
    task: Task, model: nn.Module, windows: TokenWindows, *, tokenizer: Any
) -> float:
    """Compare the perplexity in bfloat16 with that in float32.

    Returns:
        The difference as a fraction, not below 0; inf where bfloat16 overflows, or
        torch does not mix it with what the model keeps in float32, as batch norms do.
    """
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        try:
            with computing_in(model, dtype):
                losses.append(_mean_loss(task, model, windows, tokenizer))
        except RuntimeError as error:
            if dtype == torch.float32:  # it is not the type that is at fault
                raise
            log.info("the model does not run in bfloat16: %s", error)
            losses.append(math.inf)
    difference = losses[0] - losses[1]
    return abs(math.expm1(difference)) if difference < _OVERFLOW else math.inf


def _remembered(memory: Path) -> float | None:
    """Read a verdict; one that is absent or damaged is made again."""
    try:
        return float(json.loads(memory.read_text())["difference"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mean_loss(
    task: Task, model: nn.Module, windows: TokenWindows, tokenizer: Any
) -> float:
    losses = []
    with torch.inference_mode():
        head = task.head(model)
        for ids in torch.split(windows.ids[:WINDOWS], 4):
            batch = task.batch(ids, tokenizer)
            losses.append(head.losses(task.features(model, batch), batch.labels))
    return float(torch.cat(losses).double().mean())
