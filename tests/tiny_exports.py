"""What an export starts from: a tiny checkpoint on disk, and variants of every kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import tiny
from torch import Tensor
from transformers import PreTrainedModel

from autoprune.compression.grids import fit_grid, nearest_codes
from autoprune.compression.masks import kept_by_pattern, kept_by_sparsity
from autoprune.compression.storage import Part, Storage
from autoprune.compression.variant import Variant
from autoprune.exporting.exporter import ExportJob
from autoprune.models.checkpoints import Checkpoint, load_model
from autoprune.models.layers import (
    inventory,
    read_weight,
    untouched_parameters,
    write_weight,
)
from autoprune.policy import Action, Layer, Policy

GROUP = 8
"""Divides every width of the tiny models."""

Form = Callable[[Tensor], Variant]


def _bitmap(weight: Tensor) -> Variant:
    kept = kept_by_sparsity(weight.abs().float(), 0.37, per="row")
    return Variant.dense(weight).pruned(weight, kept)


def _pattern(pattern: str) -> Form:
    def form(weight: Tensor) -> Variant:
        kept = kept_by_pattern(weight.abs().float(), pattern)
        return Variant.dense(weight).pruned(weight, kept, pattern=pattern)

    return form


def _codes(bits: int, *, symmetric: bool, before: Form = Variant.dense) -> Form:
    def form(weight: Tensor) -> Variant:
        variant = before(weight)
        grid: dict[str, Any] = {"bits": bits, "dtype": weight.dtype}
        full = variant.weight.float()
        scales, zeros = fit_grid(full, group=GROUP, symmetric=symmetric, **grid)
        codes = nearest_codes(full, scales, zeros, bits=bits)
        stored = None if symmetric else zeros.to(torch.uint8)
        return variant.quantized(codes, scales, stored, bits=bits, group=GROUP)

    return form


FORMS: dict[str, Form] = {
    "dense": Variant.dense,
    "bitmap(sparsity=0.37)": _bitmap,
    "nm(pattern=2:4)": _pattern("2:4"),
    "nm(pattern=4:8)": _pattern("4:8"),
    **{f"symmetric(bits={b})": _codes(b, symmetric=True) for b in (3, 4, 8)},
    **{f"zeros(bits={b})": _codes(b, symmetric=False) for b in (3, 4, 8)},
    "nm(pattern=2:4) + symmetric(bits=4)": _codes(
        4, symmetric=True, before=_pattern("2:4")
    ),
}
"""Every way to store a layer, by the action that stands for it."""


@dataclass(frozen=True)
class Case:
    """A job, and what its export has to be equal to."""

    job: ExportJob
    dense: PreTrainedModel
    model: PreTrainedModel
    policy: Policy
    untouched: dict[str, Part]

    def logits(self, model: PreTrainedModel | None = None) -> Tensor:
        """Run some tokens; without a model, what is expected."""
        ids = torch.arange(3, 13)[None]
        with torch.inference_mode():
            logits: Tensor = (model or self.model)(input_ids=ids).logits
        return logits


def case_of(folder: Path, auto_class: str, forms: Sequence[str]) -> Case:
    """Make a job from a checkpoint; sites take the forms in turn."""
    checkpoint = Checkpoint(str(folder), folder, "0123456789abcdef")
    dense, model = (load_model(checkpoint, auto_class) for _ in range(2))
    found = inventory(dense, register_architectures())
    untouched = untouched_parameters(dense, found)
    turns = {site: forms[i % len(forms)] for i, site in enumerate(found.sites)}
    actions = {layer: text for site, text in turns.items() for layer in site.layers}
    variants = {
        layer: FORMS[text](read_weight(dense, layer).clone())
        for layer, text in actions.items()
    }
    for layer, variant in variants.items():
        write_weight(model, layer, variant.weight)
    storages: dict[Layer, Storage] = {la: v.storage for la, v in variants.items()}
    parsed = {layer: Action.parse(text) for layer, text in actions.items()}
    job = ExportJob(
        checkpoint, auto_class, found, storages, variants.__getitem__, parsed
    )
    policy = Policy({site.name: Action.parse(text) for site, text in turns.items()})
    parts = {name: Part(dtype, shape) for name, (dtype, shape) in untouched.items()}
    return Case(job, dense, model, policy, parts)


def tiny_case(kind: str, folder: Path, forms: Sequence[str] = tuple(FORMS)) -> Case:
    """Make a job for a tiny random model of a type."""
    tiny(kind).save_pretrained(folder)
    masked = kind == "bert"
    auto_class = "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"
    return case_of(folder, auto_class, forms)
