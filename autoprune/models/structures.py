"""Structures of a model: units that several layers make and take together.

Dependencies come from the description of the model family, or from tracing where there
is none: the rows of some layers are the columns of another one. A unit that is removed
is removed in all of them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from autoprune.errors import PolicyError
from autoprune.models.architecture import Architecture, StreamRule, StructureRule
from autoprune.models.hidden import HIDDEN, hidden_cuts, hidden_state
from autoprune.models.kinds import columns_of
from autoprune.policy import Layer, Site
from autoprune.sites import Cut

BLOCK = "block"
"""Kind and last name of the site that is a whole block."""

STREAM = "stream"
"""Kind of the sites that are residual streams, and of their channels."""


def with_structures(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[Site],
    paths: Sequence[str],
) -> tuple[tuple[Site, ...], tuple[Site, ...], tuple[str, ...]]:
    """Find the structures that a description names.

    Args:
        model: The model, for how many heads it has.
        architecture: The description.
        sites: The sites of all blocks.
        paths: Those of the blocks.

    Returns:
        The sites, their layers told where units lie; the sites that structures, whole
        blocks and the whole model make; notes on structures that the model's shapes do
        not fit.
    """
    by_name = {layer.name: layer for site in sites for layer in site.layers}
    found: dict[str, tuple[str, list[Layer]]] = {}
    misfits: dict[str, str] = {}
    for block, path in enumerate(paths):
        for rule in architecture.structures or ():
            names = [f"{path}.{part}" for part in (*rule.makers, *rule.takers)]
            if absent := [name for name in names if name not in by_name]:
                misfits.setdefault(rule.name, f"{absent[0]} is part of no site")
                continue
            layers = [by_name[name] for name in names]
            try:
                cuts = list(_cuts(model, rule, layers))
            except ValueError as error:
                misfits.setdefault(rule.name, str(error))
                continue
            behind = (f"{path}.{one}" for one in rule.norms)
            norms = dict(zip(names, behind, strict=False))  # of makers, which are first
            for layer, cut in zip(layers, cuts, strict=True):
                norm = norms.get(layer.name)
                by_name[layer.name] = replace(layer, cut=cut, norm=norm)
            place = f"blocks.{block}.{rule.name}"
            found[place] = rule.kind, [by_name[name] for name in names]
    for stream in architecture.streams(model) if architecture.streams else ():
        by_name |= _in_stream(stream, by_name)
        names = [*stream.makers, *stream.takers]
        found[stream.name] = STREAM, [by_name[name] for name in names]
    if state := hidden_state(model, architecture, len(paths)):
        for name, cut in hidden_cuts(state, by_name, _heads(model)).items():
            by_name[name] = replace(by_name[name], hidden=cut)
    found = {
        place: (kind, [by_name[layer.name] for layer in layers])
        for place, (kind, layers) in found.items()
    }
    sites = tuple(
        replace(site, layers=tuple(by_name[layer.name] for layer in site.layers))
        for site in sites
    )
    for block in range(len(paths)):
        inside = [la for site in sites for la in site.layers if la.block == block]
        found[f"blocks.{block}.{BLOCK}"] = BLOCK, inside
    if architecture.embedding:
        found[HIDDEN] = HIDDEN, [la for site in sites for la in site.layers]
    groups = tuple(Site(n, tuple(layers), kind) for n, (kind, layers) in found.items())
    notes = tuple(f"no site {name!r}: {why}" for name, why in misfits.items())
    return sites, groups, notes


def _cuts(
    model: nn.Module, rule: StructureRule, layers: Sequence[Layer]
) -> Iterator[Cut]:
    """Tell where in each layer the units lie; ValueError if they fill it unevenly."""
    makers = len(rule.makers)
    channels = rule.kind == "channels"
    units = rule.units or (channels and _channels(model, layers[-1]))
    units = units or _head_groups(model)
    for index, layer in enumerate(layers):
        axis = "rows" if index < makers else "columns"
        size = layer.shape[0] if index < makers else layer.shape[1]
        if not units or size % units:
            raise ValueError(
                f"{size} {axis} of {layer.name} are no multiple of {units} units"
            )
        yield Cut(rule.kind, axis, size // units, units)


def _in_stream(rule: StreamRule, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Tell where in each layer of a residual stream its channels lie."""
    width = layers[rule.makers[0]].shape[0]
    told = {}
    for name in (*rule.makers, *rule.takers):
        layer, axis = layers[name], "rows" if name in rule.makers else "columns"
        lines = layer.shape[0] if axis == "rows" else layer.shape[1]
        told[name] = replace(layer, hidden=Cut(STREAM, axis, lines // width, width))
    return told


def _channels(model: nn.Module, taker: Layer) -> int:
    """Count the channels that a layer reads."""
    return taker.shape[1] // columns_of(model.get_submodule(taker.name))


def _head_groups(model: nn.Module) -> int:
    """Count the heads, or the groups of them that share keys and values."""
    config: Any = model.config
    heads = getattr(config.get_text_config(), "num_key_value_heads", None)
    return int(heads or _heads(model))


def _heads(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().num_attention_heads)


def partition(
    sites: Sequence[Site], groups: Sequence[Site], names: Collection[str]
) -> tuple[Site, ...]:
    """Let the groups that are named take the place of the sites that they cover.

    Raises:
        PolicyError: If two of them overlap.
    """
    taken: dict[Layer, Site] = {}
    for group in groups:
        if group.name not in names:
            continue
        for layer in group.layers:
            if layer in taken:
                raise PolicyError(
                    f"sites {taken[layer].name!r} and {group.name!r} both hold "
                    f"{layer.name}. Name one of them."
                )
            taken[layer] = group
    placed: Mapping[Site, None] = dict.fromkeys(
        taken.get(site.layers[0], site) for site in sites
    )
    return tuple(placed)


def groups_named(groups: Sequence[Site], globs: Collection[str]) -> set[str]:
    """Find the groups that a glob asks for by their last name, as ``*.mlp`` does."""
    return {
        group.name
        for group in groups
        for glob in globs
        if fnmatchcase(group.name, glob)
        and glob.rpartition(".")[2] == group.name.rpartition(".")[2]
    }
