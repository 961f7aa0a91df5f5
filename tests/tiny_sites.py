"""Tiny models with actions on sites that read statistics and may leave biases."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from autoprune_plugins.flap import Fluctuation
from autoprune_plugins.ria import Ria
from autoprune_plugins.rtn import RoundToNearest
from tiny_exports import Case, case_of
from tiny_models import tiny

from autoprune.compression.actions import Actions
from autoprune.compression.method import Source
from autoprune.compression.structured import StructuredMethod
from autoprune.compression.variant import Variant
from autoprune.models.biases import put_bias
from autoprune.models.layers import read_weight, write_weight
from autoprune.models.statistics import Gathering, InputStatistics
from autoprune.policy import Action, Layer

METHODS = [Fluctuation(), Ria(), RoundToNearest()]
ACTIONS = Actions({method.name: method for method in METHODS})


def read_by(layer: Layer) -> InputStatistics:
    """Make statistics of random inputs whose means and sizes differ."""
    generator = torch.Generator().manual_seed(len(str(layer.input)))
    width = layer.shape[1]
    inputs = torch.randn(64, width, generator=generator) + 1
    gathering = Gathering({"input_norm", "input_sum"}, width)
    gathering.add(inputs * (0.2 + torch.rand(width, generator=generator)))
    return gathering.result()


def variants_of(
    case: Case, layers: Sequence[Layer], action: Action
) -> dict[Layer, Variant]:
    """Make variants of layers under an action, as a bank would."""
    made = {la: Variant.dense(read_weight(case.dense, la).clone()) for la in layers}
    known = {str(layer.input): read_by(layer) for layer in layers}
    for step in action.steps:
        method, settings = ACTIONS.method(step), [ACTIONS.settings(step)]
        sources = [Source(la, v, v.weight) for la, v in made.items()]
        if isinstance(method, StructuredMethod):
            found = method.compress_site(sources, known, settings)
        else:
            found = [
                method.compress([s], known[str(s.layer.input)], settings)[0]
                for s in sources
            ]
        made = {s.layer: one[0] for s, one in zip(sources, found, strict=True)}
    return made


def site_case(
    kind: str,
    folder: Path,
    policy: dict[str, str],
    *,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Case:
    """Put actions on sites or structures of a tiny model; the others stay dense."""
    tiny(kind, **changes).to(dtype).save_pretrained(folder)
    masked = kind == "bert"
    auto_class = "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"
    case = case_of(folder, auto_class, ["dense"])
    inventory = case.job.inventory
    sites = {site.name: site for site in (*inventory.groups, *inventory.sites)}
    variants: dict[Layer, Variant] = {
        layer: case.job.variant(layer) for layer in case.job.storages
    }
    actions = dict(case.job.actions)
    for name, text in policy.items():
        action = Action.parse(text)
        for layer, variant in variants_of(case, sites[name].layers, action).items():
            assert variant.storage == ACTIONS.storage(layer, action)
            write_weight(case.model, layer, variant.weight)
            put_bias(case.model, layer, variant.bias)
            variants[layer], actions[layer] = variant, action
    storages = {layer: variant.storage for layer, variant in variants.items()}
    job = replace(
        case.job, storages=storages, variant=variants.__getitem__, actions=actions
    )
    return replace(case, job=job)
