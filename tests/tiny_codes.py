"""A tiny model whose layers have codes of every kind, wide enough for real groups."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from autoprune_plugins.drop import Drop
from autoprune_plugins.fp8 import Fp8
from autoprune_plugins.hqq import register_methods as hqq
from autoprune_plugins.int8_dynamic import Int8Dynamic
from autoprune_plugins.magnitude import register_methods as magnitude
from autoprune_plugins.microscaling import Mxfp4, Nvfp4
from autoprune_plugins.nf4 import register_methods as nf4
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.units import Channels, Heads
from tiny_exports import Case, case_of
from tiny_models import tiny

from autoprune.compression.actions import Actions
from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.storage import Storage
from autoprune.compression.structured import StructuredMethod
from autoprune.compression.variant import Variant
from autoprune.exporting.digests import digest
from autoprune.exporting.exporter import Exporter
from autoprune.models.biases import put_bias
from autoprune.models.layers import read_weight, write_weight
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Action, Layer

WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "vocab_size": 64,
}
"""Sizes that groups of 32 and 64 divide."""

METHODS: list[CompressionMethod] = [
    *(RoundToNearest(), Int8Dynamic(), Fp8(), Mxfp4(), Nvfp4()),
    *(Channels(), Heads(), Drop(), *magnitude(), *nf4(), *hqq()),
]
ACTIONS = Actions({method.name: method for method in METHODS})


def variants_of(case: Case, layers: tuple[Layer, ...], action: Action) -> list[Variant]:
    """Make the variants of some layers."""
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


def storage_of(layer: Layer, text: str) -> Storage:
    """Declare what a layer stores under an action."""
    return ACTIONS.storage(layer, Action.parse(text))


def layer_of(case: Case, end: str) -> Layer:
    """Find a layer by the end of its name."""
    return next(layer for layer in case.job.storages if layer.name.endswith(end))


def coded_case(
    kind: str,
    folder: Path,
    policy: dict[str, str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    every: str = "",
    **changes: Any,
) -> Case:
    """Put actions on sites, or structures, of a tiny model.

    Args:
        kind: Its type.
        folder: Where its checkpoint goes.
        policy: Actions by name of a site or structure.
        dtype: Its type.
        every: The action of all other sites in blocks; none by default.
        **changes: Of its configuration.
    """
    tiny(kind, **{**WIDE, **changes}).to(dtype).save_pretrained(folder)
    case = case_of(folder, "AutoModelForCausalLM", ["dense"])
    found = case.job.inventory
    sites = {site.name: site for site in (*found.groups, *found.sites)}
    named = {layer for name in policy for layer in sites[name].layers}
    if every:
        rest = [s for s in found.sites if s.layers[0].block is not None]
        policy = {s.name: every for s in rest if not named & {*s.layers}} | policy
    variants = {layer: case.job.variant(layer) for layer in case.job.storages}
    for name, text in policy.items():
        layers = sites[name].layers
        made = variants_of(case, layers, Action.parse(text))
        variants |= dict(zip(layers, made, strict=True))
    return with_variants(case, variants)


def with_variants(case: Case, variants: dict[Layer, Variant]) -> Case:
    """Give the case with other variants in it."""
    for layer, variant in variants.items():
        write_weight(case.model, layer, variant.weight)
        put_bias(case.model, layer, variant.bias)
    storages = {layer: variant.storage for layer, variant in variants.items()}
    job = replace(case.job, storages=storages, variant=variants.__getitem__)
    return replace(case, job=job)


def export_of(
    case: Case, folder: Path, target: Exporter
) -> tuple[Any, dict[str, Any], list[str]]:
    """Write and load; check sizes, prices and digests; give model, settings, notes."""
    folder.mkdir()
    exporter = target.for_model(case.dense, case.job.inventory)
    storages = case.job.storages
    assert not any(exporter.refuses(la, s) for la, s in storages.items())
    assert exporter.refuses_policy(storages, case.job.inventory) is None
    digests = exporter.write(folder, case.job)
    predicted = exporter.size_bytes(storages, case.untouched)
    assert exporter.written_bytes(folder) == predicted
    prices = [exporter.layer_bytes(la, s) for la, s in storages.items()]
    assert predicted <= exporter.size_bytes({}, case.untouched) + sum(prices)
    model = exporter.load(folder)
    state = model.state_dict()
    assert digests.keys() <= state.keys()
    assert all(digest(state[name]) == found for name, found in digests.items())
    config = json.loads((folder / "config.json").read_text())
    return model, config, exporter.notes(storages)
