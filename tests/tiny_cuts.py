"""A tiny model with structured actions on some sites, ready to be exported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from autoprune_plugins.drop import Drop
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.units import Channels, Heads
from tiny_exports import Case, case_of
from tiny_models import tiny

from autoprune.compression.actions import Actions
from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.structured import StructuredMethod
from autoprune.compression.variant import Variant
from autoprune.models.layers import read_weight, write_weight
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Action, Layer

METHODS: list[CompressionMethod] = [Channels(), Heads(), Drop(), RoundToNearest()]
ACTIONS = Actions({method.name: method for method in METHODS})


def variants_of(case: Case, layers: tuple[Layer, ...], action: Action) -> list[Variant]:
    made = [Variant.dense(read_weight(case.dense, layer).clone()) for layer in layers]
    for step in action.steps:
        method, settings = ACTIONS.method(step), [ACTIONS.settings(step)]
        sources = [Source(la, v) for la, v in zip(layers, made, strict=True)]
        if isinstance(method, StructuredMethod):
            made = [one[0] for one in method.compress_site(sources, {}, settings)]
        else:
            made = [
                method.compress([s], NO_STATISTICS, settings)[0][0] for s in sources
            ]
    return made


def cut_case(kind: str, folder: Path, policy: dict[str, str], **changes: Any) -> Case:
    """Put actions on sites of a tiny model; the others stay dense."""
    tiny(kind, **changes).save_pretrained(folder)
    case = case_of(folder, "AutoModelForCausalLM", ["dense"])
    groups = {group.name: group for group in case.job.inventory.groups}
    variants: dict[Layer, Variant] = {
        layer: case.job.variant(layer) for layer in case.job.storages
    }
    actions = dict(case.job.actions)
    for name, text in policy.items():
        action, layers = Action.parse(text), groups[name].layers
        made = variants_of(case, layers, action)
        for layer, variant in zip(layers, made, strict=True):
            assert variant.storage == ACTIONS.storage(layer, action)
            write_weight(case.model, layer, variant.weight)
            variants[layer], actions[layer] = variant, action
    storages = {layer: variant.storage for layer, variant in variants.items()}
    job = replace(
        case.job, storages=storages, variant=variants.__getitem__, actions=actions
    )
    return replace(case, job=job)
