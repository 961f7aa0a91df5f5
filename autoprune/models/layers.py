"""The inventory of a model's layers and sites.

Where a model family keeps its layers comes as a description from a plugin, or else is
traced.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from autoprune.errors import ModelError, PolicyError, unknown_name
from autoprune.models.architecture import Architecture as Architecture
from autoprune.models.architecture import SiteRule as SiteRule
from autoprune.models.architecture import StructureRule as StructureRule
from autoprune.models.finding import block_paths, find, find_layer, has_all
from autoprune.models.hidden import HiddenState, hidden_state
from autoprune.models.kinds import columns_of
from autoprune.models.structures import groups_named, partition, with_structures
from autoprune.models.tracing import find_blocks, traced, traced_structures
from autoprune.models.weights import (
    MATRICES,
    dtype_name,
    find_weight,
    parameter_of,
    read_weight,
    roles_of,
    write_weight,
)
from autoprune.policy import Layer, Site

__all__ = [
    "Architecture",
    "Inventory",
    "SiteRule",
    "StructureRule",
    "inventory",
    "read_weight",
    "untouched_parameters",
    "write_weight",
]

log = logging.getLogger(__name__)

Feed = Callable[[Tensor], Mapping[str, Any]]
"""Takes windows, gives keyword arguments of a model's body."""


@dataclass(frozen=True)
class Inventory:
    """The layers and sites of one model.

    Attributes:
        architecture: Name of the description used; ``traced`` where none fits, and
            ``unknown`` where tracing failed as well.
        blocks: Paths of the blocks, in order.
        sites: The embedding if it is one, then every block's sites in order.
        notes: What a user should know of how the sites were found.
        tied: True if the head is the embedding's weight.
        groups: Sites that may take the place of others: the channels of an MLP, the
            heads of an attention, whole blocks, the whole model.
        hidden: The hidden state, where it may be rotated.
        feed: Makes what the model's body is given of windows, as keyword arguments;
            None where that is the windows themselves, as tokens are.
    """

    architecture: str
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()
    tied: bool = False
    groups: tuple[Site, ...] = ()
    hidden: HiddenState | None = None
    feed: Feed | None = field(default=None, compare=False)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer, in the order of the sites."""
        return tuple(layer for site in self.sites for layer in site.layers)

    def unfused(self) -> "Inventory":
        """Give every layer a site of its own, for formats that no runtime fuses."""
        pairs = [(site, layer) for site in self.sites for layer in site.layers]
        sites = tuple(Site(site.part(la), (la,), site.kind) for site, la in pairs)
        return replace(self, sites=sites)

    def sites_for(self, names: Collection[str]) -> tuple[Site, ...]:
        """Give the sites, with the groups among the names in the place of their parts.

        Raises:
            PolicyError: If two of the groups overlap.
        """
        chosen = self._groups_by_name.keys() & names
        return partition(self.sites, self.groups, chosen) if chosen else self.sites

    def groups_named(self, globs: Collection[str]) -> set[str]:
        """Find the groups that a glob asks for by their last name, as ``*.mlp``."""
        return groups_named(self.groups, globs)

    def group_of(self, layer: Layer, kinds: Collection[str] = ()) -> Site:
        """Give the site of the structure that a layer is part of.

        Args:
            layer: The layer.
            kinds: Kinds of structures to look among; by default that inside of a block.
        """
        kinds = kinds or ([layer.cut.kind] if layer.cut else [])
        return next(g for g in self.groups if g.kind in kinds and layer in g.layers)

    @cached_property
    def _groups_by_name(self) -> dict[str, Site]:
        return {group.name: group for group in self.groups}

    def layer(self, name: str) -> Layer:
        """Look up a layer; PolicyError, with near misses, if there is none."""
        if name not in self._by_name:
            raise PolicyError(unknown_name("layer", name, self._by_name))
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}


def inventory(model: nn.Module, architectures: Sequence[Architecture]) -> Inventory:
    """List a model's layers and sites.

    A model that no description fits is traced: one of its blocks is run. If it cannot
    be, it gets one site a layer. Either way ``notes`` and a logged warning say so.

    Raises:
        ModelError: If two descriptions fit, if the model lacks a described path, or if
            an unknown model has no list of blocks.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    fitting = [entry for entry in architectures if entry.fits(model)]
    if len(fitting) > 1:
        raise ModelError(
            f"two architectures describe model type {kind!r}: {fitting[0].name!r} and "
            f"{fitting[1].name!r}. Leave one of their plugins out."
        )
    if not fitting:
        return _unknown(model, kind)
    if fitting[0].structures is not None:
        return _described(model, fitting[0])
    structures, notes = traced_structures(model, fitting[0].blocks)
    return _described(model, replace(fitting[0], structures=structures), notes)


def untouched_parameters(
    model: nn.Module, inventory: Inventory
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """List what a checkpoint stores beside the layers: norms, biases, an untied head.

    The embedding counts as a layer where it is a site.

    Returns:
        Type and shape of each parameter and persistent buffer, tied ones once, by the
        model's own names (``save_pretrained`` may write some under older names).
    """
    state = model.state_dict(keep_vars=True)
    skipped = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    aliases = getattr(model, "all_tied_weights_keys", None) or {}
    seen = {id(state[parameter_of(layer.name)]) for layer in inventory.layers}
    untouched = {}
    # Aliases come last, so that the name that stays is the one save_pretrained keeps.
    for name in sorted(state, key=lambda name: name in aliases):
        tensor = state[name]
        if name not in skipped and id(tensor) not in seen:
            seen.add(id(tensor))
            untouched[name] = (dtype_name(tensor), tuple(tensor.shape))
    return untouched


def _described(
    model: nn.Module, architecture: Architecture, notes: Sequence[str] = ()
) -> Inventory:
    """List the sites that a description names."""
    paths = block_paths(model, architecture)
    sites = []
    if name := architecture.embedding:
        find(model, architecture, name, nn.Embedding)
        role = name.rpartition(".")[2]
        layer = _layer(model, name, block=None, role=role, input=None)
        sites.append(Site("embedding", (layer,), "embedding"))
    for index, path in enumerate(paths):
        for rule in architecture.sites:
            if not rule.optional or has_all(model, path, rule.layers):
                layers = tuple(_ruled(model, architecture, rule, index, path))
                sites.append(Site(f"blocks.{index}.{rule.name}", layers))
    placed, groups, misfits = with_structures(model, architecture, sites, paths)
    told = (*notes, *misfits)
    named = architecture.name, paths, placed, told, _is_tied(model), groups
    return Inventory(*named, hidden_state(model, architecture, len(paths)))


def _ruled(
    model: nn.Module, architecture: Architecture, rule: SiteRule, index: int, block: str
) -> Iterator[Layer]:
    """Give the layers of one rule in one block."""
    roles = roles_of([path for site in architecture.sites for path in site.layers])
    first: Layer | None = None
    for path in rule.layers:
        name = f"{block}.{path}"
        found = find_layer(model, architecture, name)
        common = {"block": index, "role": roles[path]}
        if isinstance(found, nn.Parameter):
            uses = _expert_uses(model, architecture, found)
            for expert in range(found.shape[0]):
                full = f"{name}[{expert}]"
                yield _layer(model, full, **common, input=full, uses=uses)
            continue
        source = first.name if first and rule.one_input else name
        layer = _layer(model, name, **common, input=source, kernel=columns_of(found))
        first = first or layer
        if rule.one_input and layer.shape[1] != first.shape[1]:
            raise ModelError(
                f"architecture {architecture.name!r}: layers of site {rule.name!r} "
                f"share an input, but {first.name!r} reads {first.shape[1]} and "
                f"{name!r} {layer.shape[1]} channels. Set one_input=False."
            )
        yield layer


def _unknown(model: nn.Module, kind: str | None) -> Inventory:
    """Trace a model that no description fits."""
    path, items = find_blocks(model)
    try:
        architecture, refused = traced(model, path)
    except ModelError as error:
        return _one_by_one(model, path, items, kind=kind, why=str(error))
    sites = ", ".join(rule.name for rule in architecture.sites)
    units = [f"{one.name} of {one.units}" for one in architecture.structures or ()]
    note = (
        f"unknown architecture {kind!r}: traced in the first of {len(items)} blocks of "
        f"{path!r}, sites {sites}; units {', '.join(units) or 'none'}. Describe it "
        "with the hook register_architectures if that is not so."
    )
    log.warning("%s", note)
    return _described(model, architecture, (note, *refused))


def _one_by_one(
    model: nn.Module, path: str, items: nn.ModuleList, *, kind: str | None, why: str
) -> Inventory:
    """List one site a layer, for a model that cannot be traced either."""
    blocks = tuple(f"{path}.{index}".lstrip(".") for index in range(len(items)))
    sites: list[Site] = []
    seen: set[int] = set()
    for index, block in enumerate(items):
        inner = [(p, m) for p, m in block.named_modules() if isinstance(m, MATRICES)]
        roles = roles_of([part for part, _ in inner])
        for part, module in inner:
            if id(module.weight) in seen:  # shared between modules
                continue
            seen.add(id(module.weight))
            name = f"{blocks[index]}.{part}".rstrip(".")
            layer = _layer(model, name, block=index, role=roles[part], input=name)
            site = f"blocks.{index}.{part}".rstrip(".").replace("/", "_")
            sites.append(Site(site, (layer,)))
    note = (
        f"unknown architecture {kind!r}: one site a layer, {len(sites)} in the "
        f"{len(blocks)} blocks of {path!r}; everything else stays untouched. Describe "
        "it with the hook register_architectures to have fused sites and structures; "
        f"it could not be traced: {why}"
    )
    log.warning("%s", note)
    return Inventory("unknown", blocks, tuple(sites), (note,), _is_tied(model))


def _layer(model: nn.Module, name: str, **fields: Any) -> Layer:
    weight = find_weight(model, name)
    assert weight is not None, name
    return Layer(name, (weight.shape[0], weight.shape[1]), dtype_name(weight), **fields)


def _expert_uses(
    model: nn.Module, architecture: Architecture, experts: nn.Parameter
) -> float:
    config: Any = model.config
    chosen = getattr(config.get_text_config(), "num_experts_per_tok", None)
    if experts.dim() != 3 or chosen is None:
        raise ModelError(
            f"architecture {architecture.name!r} describes experts: expected a 3-D "
            f"parameter and num_experts_per_tok in {type(config).__name__}, found "
            f"shape {tuple(experts.shape)} and {chosen}"
        )
    return float(chosen / experts.shape[0])


def _is_tied(model: Any) -> bool:
    """Tell if the head is the embedding's parameter."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and head.weight is model.get_input_embeddings().weight
