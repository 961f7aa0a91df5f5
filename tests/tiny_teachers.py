"""Tiny models of every kind of head, and tokens to compare them on."""

from types import SimpleNamespace
from typing import Any

import torch
from autoprune_plugins.tasks import CausalLM, MaskedLM
from tiny_models import tiny
from torch import nn

from autoprune.models.task import Task
from autoprune.models.text import TokenWindows

MASK = SimpleNamespace(mask_token_id=3)


def windows(count: int = 5, length: int = 24) -> TokenWindows:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 60, (count, length), generator=generator)
    return TokenWindows(ids, "fitness", "test", "0" * 16)


def task_of(kind: str) -> Task:
    return MaskedLM() if kind == "bert" else CausalLM()


def disturb(model: nn.Module, *, embedding: bool = False) -> None:
    """Change weights as a compression would."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        inside = any(part in name for part in ("layers", "layer.", ".h."))
        if inside or (embedding and ("embed" in name or "wte" in name)):
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter += 0.05 * noise


def make(kind: str, settings: dict[str, float]) -> Any:
    model: Any = tiny(kind)
    for name, value in settings.items():
        setattr(model.config, name, value)
    if std := settings.get("head_bias"):
        noise = torch.randn(64, generator=torch.Generator().manual_seed(5))
        model.lm_head.bias = nn.Parameter(std * noise, requires_grad=False)
    return model


CASES = {
    "plain": ("llama", {}),
    "tied": ("qwen2", {}),
    "bias": ("bert", {}),
    "softcap": ("gemma2", {"final_logit_softcapping": 3.0}),
    "scale": ("granite", {"logits_scaling": 4.0}),
    "scaled-bias": ("granite", {"logits_scaling": 4.0, "head_bias": 3.0}),
    "experts": ("mixtral", {}),
    "conv1d": ("gpt2", {}),
}
