"""Sites and structures of a model that nobody has described, found by running it.

One block is run on a few tokens, again and again with noise in place of what some of
its layers give: so the model may be written in any way.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from torch import nn

from autoprune.errors import ModelError
from autoprune.models.architecture import Architecture, SiteRule, StructureRule
from autoprune.models.dependencies import Flow, Link, flow_of, links_of, units_of
from autoprune.models.probing import BlockProbe
from autoprune.models.weights import MATRICES


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the blocks: the longest list of modules that have layers.

    Raises:
        ModelError: If there is none.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(isinstance(inner, MATRICES) for inner in module.modules())
    }
    # A list inside of another is no list of blocks: old experts, for example.
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if not outer:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        raise ModelError(
            f"cannot find the blocks of model type {kind!r} ({type(model).__name__}): "
            "it has no nn.ModuleList with nn.Linear layers. Describe the model with "
            "the hook register_architectures."
        )
    path = max(outer, key=lambda name: len(lists[name]))
    return path, lists[path]


def traced(model: nn.Module, blocks: str) -> tuple[Architecture, tuple[str, ...]]:
    """Find what a description would say of a model.

    Block 0 is run; the others have to be built as it is.

    Args:
        model: The model, in evaluation mode.
        blocks: Path of its blocks.

    Returns:
        A description of this model, and notes on what it does not offer, and why.

    Raises:
        ModelError: If the blocks differ, share weights, or cannot be run.
    """
    probe = BlockProbe(model, _first_block(model, blocks))
    flow = flow_of(probe)
    links, notes = links_of(probe, flow)
    structures, refused = _structures(probe, links)
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    found = Architecture(
        "traced",
        (str(getattr(getattr(model, "config", None), "model_type", None)),),
        blocks,
        tuple(_sites(probe, flow, links)),
        next((n for n, m in model.named_modules() if m is table), None)
        if isinstance(table, nn.Embedding)
        else None,
        structures,
    )
    return found, (*notes, *refused, *_left_out(probe))


def traced_structures(
    model: nn.Module, blocks: str
) -> tuple[tuple[StructureRule, ...], tuple[str, ...]]:
    """Find the structures of a model whose description has left them open.

    Args:
        model: The model, in evaluation mode.
        blocks: Path of its blocks.

    Returns:
        The structures, and notes on those that are not offered.
    """
    try:
        probe = BlockProbe(model, _first_block(model, blocks))
        links, notes = links_of(probe, flow_of(probe))
        structures, refused = _structures(probe, links)
    except ModelError as error:
        return (), (f"structures could not be traced: {error}",)
    return structures, (*notes, *refused)


def _first_block(model: nn.Module, blocks: str) -> str:
    """Name block 0, if all others are built as it is."""
    first, *others = model.get_submodule(blocks).children()
    if isinstance(first, MATRICES):
        raise ModelError(f"blocks are bare layers, found {type(first).__name__}")
    built = [(n, type(m)) for n, m in first.named_modules()]
    shapes = {n: p.shape for n, p in first.named_parameters()}
    seen = {id(p) for p in first.parameters()}
    for index, other in enumerate(others, start=1):
        found = {n: p.shape for n, p in other.named_parameters()}
        if odd := sorted(n for n in found | shapes if found.get(n) != shapes.get(n)):
            raise ModelError(f"block {index} differs from block 0 in {odd[0]!r}")
        if built != [(n, type(m)) for n, m in other.named_modules()]:
            raise ModelError(f"block {index} has other modules than block 0")
        if seen & {id(p) for p in other.parameters()}:
            raise ModelError(f"block {index} shares weights with one before it")
        seen |= {id(p) for p in other.parameters()}
    weights = [id(m.weight) for m in first.modules() if isinstance(m, MATRICES)]
    if len(set(weights)) < len(weights):
        raise ModelError("layers of a block share their weights")
    return f"{blocks}.0"


def _structures(
    probe: BlockProbe, links: Sequence[Link]
) -> tuple[tuple[StructureRule, ...], list[str]]:
    """Find the units of layers that belong together; notes where there are none."""
    rules: list[StructureRule] = []
    notes = []
    names = _names(links)
    for link in sorted(links, key=lambda one: -len(one.makers)):
        try:
            for rule in rules:
                if both := {*rule.makers, *rule.takers}.intersection(link.layers):
                    raise ValueError(f"{min(both)} is part of {rule.name!r} as well")
            units = units_of(probe, link)
        except ValueError as why:
            notes.append(f"no site {names[link]!r}: {why}")
            continue
        width = probe.first.read[link.taker].shape[1]
        kind = "heads" if link.mixes and units < width else "channels"
        whole = (link.makers, (link.taker,))
        rules.append(StructureRule(names[link], kind, *whole, units))
    return tuple(sorted(rules, key=lambda one: probe.ran.index(one.makers[0]))), notes


def _names(links: Sequence[Link]) -> dict[Link, str]:
    """Name structures as descriptions do, by the place too where there are several."""
    stems = Counter(_stem(link.layers) for link in links)
    names = {}
    for link in links:
        last = "attention" if link.mixes else "mlp"
        alone = sum(one.mixes == link.mixes for one in links) == 1
        stem = _stem(link.layers)
        place = stem if stem and stems[stem] == 1 else link.taker
        place = place.replace("/", "_").replace(".", "_")
        names[link] = last if alone else f"{place}.{last}"
    return names


def _stem(paths: Sequence[str]) -> str:
    """Give the part that paths begin with in common."""
    parts = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    same_parts = takewhile(lambda part: len(set(part)) == 1, parts)
    return ".".join(part[0] for part in same_parts)


def _sites(probe: BlockProbe, flow: Flow, links: Sequence[Link]) -> list[SiteRule]:
    """Let layers that read the same for the same purpose share a site."""
    groups: dict[tuple[str, frozenset[str]], list[str]] = {}
    for name in probe.ran:
        key = probe.first.source[name], frozenset(flow[name])
        groups.setdefault(key, []).append(name)
    sites = [*map(tuple, groups.values()), *((name,) for name in probe.idle)]
    named = [_site_name(layers, links) for layers in sites]
    paths = [_path_name(layers) for layers in sites]
    clash = len(set(named)) < len(named)
    names = paths if clash else named
    return [SiteRule(n, layers) for n, layers in zip(names, sites, strict=True)]


def _site_name(layers: tuple[str, ...], links: Sequence[Link]) -> str:
    """Name a site as descriptions do, if it is all of one side of a structure."""
    for link, structure in _names(links).items():
        place = structure.rpartition(".")[0]
        makers = "qkv" if link.mixes else "gate_up" if len(layers) > 1 else "up"
        sides = {link.makers: makers, (link.taker,): "o" if link.mixes else "down"}
        if layers in sides:
            return f"{place}.{sides[layers]}".lstrip(".")
    return _path_name(layers)


def _path_name(layers: tuple[str, ...]) -> str:
    first, *others = (layer.replace("/", "_") for layer in layers)
    return "_".join([first, *(other.rpartition(".")[2] for other in others)])


def _left_out(probe: BlockProbe) -> list[str]:
    """Tell what of a block is no layer, and which layers were not seen at work."""
    notes = []
    if probe.idle:
        notes.append(
            f"{len(probe.idle)} layers did not run just once, first {probe.idle[0]}: "
            "each is a site of its own, and part of no structure"
        )
    others = [
        name
        for name, parameter in probe.block.named_parameters()
        if parameter.dim() > 1
        and name.removesuffix(".weight") not in (*probe.ran, *probe.idle)
    ]
    if others:
        notes.append(
            f"{len(others)} weights of a block are no nn.Linear and stay untouched, "
            f"first {others[0]}"
        )
    return notes
