"""What methods there are, told only from what they declare: a table, and one in full.

What a method does, and to what grain, shows in what its examples store.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from autoprune.compression.actions import Actions
from autoprune.compression.examples import (
    SIDE,
    bits_per_weight,
    example_action,
    example_layer,
    example_storages,
)
from autoprune.compression.formats import FORMATS
from autoprune.compression.method import CompressionMethod, Parameter
from autoprune.compression.storage import BITMAP, Storage
from autoprune.compression.structured import SITES
from autoprune.errors import MethodError, PluginError, unknown_name
from autoprune.policy import Action, format_value

BITS_NOTE = f"of a {SIDE} x {SIDE} layer in bfloat16"
"""What the figures of the tables are of."""

_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "word"}


@dataclass(frozen=True)
class MethodCard:
    """One method, as people and machines read of it.

    Attributes:
        name: Its name.
        version: Its version.
        does: ``prunes``, ``quantizes``, ``low rank``, ``structure``, ``moves zeros``.
        sites: Where it acts: ``layers``, ``embedding``, ``channels``, ``heads``,
            ``block``.
        granularities: What goes, or shares a scale, together.
        needs: Statistics that it reads.
        parameters: What an action may set.
        example: An action that ends with it; None if it declares none.
        bits_per_weight: What that action stores of each weight, in bits.
        reference: The paper.
        description: Its docstring.
    """

    name: str
    version: str
    does: tuple[str, ...]
    sites: tuple[str, ...]
    granularities: tuple[str, ...]
    needs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    example: str | None
    bits_per_weight: float | None
    reference: str
    description: str

    @property
    def place(self) -> str:
        """Name sites of a space on which the example may stand."""
        return SITES.get(self.sites[0], "blocks.*")


def cards_of(methods: Mapping[str, CompressionMethod]) -> list[MethodCard]:
    """Describe all methods, by what they do and then by name."""
    cards = [_describe(methods[name], methods) for name in sorted(methods)]
    order = list(_DOES)
    return sorted(cards, key=lambda card: [order.index(one) for one in card.does])


def card_of(name: str, methods: Mapping[str, CompressionMethod]) -> MethodCard:
    """Describe one method.

    Raises:
        PluginError: If there is none of that name; lists near misses.
    """
    if name not in methods:
        raise PluginError(unknown_name("method", name, methods))
    return _describe(methods[name], methods)


def methods_table(cards: Sequence[MethodCard]) -> Table:
    """Make the table of methods; 80 columns will do."""
    table = Table(
        title="Methods",
        caption=f"bits: stored for a weight {BITS_NOTE}, by the example that "
        "autoprune methods NAME tells with all about a method",
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("method\nand its needs")
    table.add_column("what it does\nwhere, by what")
    table.add_column("parameters")
    table.add_column("bits", justify="right")
    table.add_column("paper", ratio=1, overflow="fold")
    for card in cards:
        table.add_row(
            "\n".join([card.name, *card.needs]),
            "\n".join(map(_listed, (card.does, card.sites, card.granularities))),
            "\n".join(parameter_text(one) for one in card.parameters),
            _bits(card),
            card.reference,
            end_section=True,
        )
    return table


def markdown_table(cards: Sequence[MethodCard]) -> str:
    """Make the table of methods for the README."""
    rows = [
        (
            f"`{card.name}`",
            _listed(card.does),
            _listed(card.sites),
            _listed(card.needs) or "nothing",
            f"{_bits(card)}, `{card.example}`" if card.example else "",
            card.reference,
        )
        for card in cards
    ]
    heads = ("method", "does", "sites", "needs", "stored bits", "paper")
    lines = [heads, ("---",) * len(heads), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def card_parts(card: MethodCard) -> list[str | Table]:
    """Tell all about one method, in lines and a table."""
    needs = _listed(card.needs) or "no statistics"
    grain = f", by {_listed(card.granularities)}" if card.granularities else ""
    parts: list[str | Table] = [
        f"{card.name} (version {card.version})\n\n{card.description}\n",
        f"does     {_listed(card.does)}{grain}",
        f"sites    {_listed(card.sites)}",
        f"needs    {needs}",
        f"paper    {card.reference}",
    ]
    if card.example is not None:
        stores = f"{_bits(card)} bits for a weight {BITS_NOTE}"
        parts.append(f"stores   {stores}: {card.example}")
    if card.parameters:
        parts.append(_parameters_table(card.parameters))
    if card.example is not None:
        rule = f'space:\n  - sites: {card.place}\n    actions: ["{card.example}"]'
        parts.append(f"In a space:\n\n{rule}")
    return parts


def parameter_text(parameter: Parameter) -> str:
    """Write a parameter with default and range: ``bits = 4 (2 to 8)``.

    What else a word may be: ``norm = l1 (or l2, mean, variance)``.
    """
    span = _range(parameter)
    if parameter.default is not None:
        text = f"{parameter.name} = {format_value(parameter.default)}"
        if parameter.choices:
            others = [one for one in parameter.choices if one != parameter.default]
            span = f"or {_listed(others)}"
        return f"{text} ({span})" if span else text
    if parameter.pattern:
        span = "N:M"
    elif not span and parameter.example is not None:
        span = f"such as {format_value(parameter.example)}"
    return f"{parameter.name}: {span or _KINDS[parameter.kind]}"


def _parameters_table(parameters: Sequence[Parameter]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("parameter", "type", "default", "range"):
        table.add_column(heading)
    table.add_column("what it is", ratio=1)
    for one in parameters:
        none = "must be named" if one.required else "none"
        default = none if one.default is None else format_value(one.default)
        kind = "N:M" if one.pattern else _KINDS[one.kind]
        table.add_row(one.name, kind, default, _range(one), one.help)
    return table


def _range(parameter: Parameter) -> str:
    if parameter.choices:
        return _listed(parameter.choices)
    low, high = parameter.low, parameter.high
    if low is None or high is None:
        return ""
    joint = "between {} and {}" if parameter.open_range else "{} to {}"
    whole = parameter.kind is int
    return joint.format(*(f"{end:.0f}" if whole else f"{end:g}" for end in (low, high)))


def _describe(
    method: CompressionMethod, methods: Mapping[str, CompressionMethod]
) -> MethodCard:
    try:
        action = example_action(method, methods)
        storages = list(example_storages(method, methods))
    except MethodError:  # a plugin's method without examples is listed all the same
        action, storages = None, []
    fixed = "group" not in {one.name for one in method.parameters}
    grains = [_grain(before, after, fixed) for before, after in storages]
    whole = bool(method.kinds)
    does = {one for pair in storages for one in _changes(*pair, whole=whole)}
    return MethodCard(
        method.name,
        method.version,
        tuple(one for one in _DOES if one in does),
        _sites(method, methods, action),
        tuple(dict.fromkeys(one for some in grains for one in some)),
        tuple(sorted(method.needs)),
        method.parameters,
        None if action is None else str(action),
        bits_per_weight(storages[0][1]) if storages else None,
        method.reference,
        (inspect.getdoc(type(method)) or "").partition("\n\nAttributes:")[0],
    )


_DOES = ("prunes", "moves zeros", "structure", "quantizes", "low rank")
"""All that methods do, in the order of tables."""


def _changes(before: Storage, after: Storage, *, whole: bool) -> list[str]:
    """Tell what a step does, from what is stored; on a whole site or on a layer."""
    if before == after:
        return ["moves zeros"]
    changed = {
        "structure": whole,
        "prunes": not whole and after.mask != before.mask,
        "quantizes": after.bits != before.bits,
        "low rank": after.low_rank != before.low_rank,
    }
    return [what for what, holds in changed.items() if holds]


def _grain(before: Storage, after: Storage, fixed: bool) -> list[str]:
    """Tell what goes together, and what shares a scale."""
    grains = []
    if before == after or after.mask != before.mask:
        grains.append(_grain_of_mask(after))
    if after.bits is not None and before.bits is None:
        if FORMATS[after.code].scales == "none":
            grains.append("tensor")
        elif after.group is None:
            grains.append("rows")
        else:
            grains.append(f"groups{f' of {after.group}' if fixed else ''}")
    return grains


def _grain_of_mask(storage: Storage) -> str:
    if storage.units is not None:
        return "units"
    if storage.mask is None or not storage.kept:
        return "whole layers"
    if storage.mask == BITMAP:
        return "unstructured"
    return "N:M" if ":" in storage.mask else "tiles"


def _sites(
    method: CompressionMethod,
    methods: Mapping[str, CompressionMethod],
    action: Action | None,
) -> tuple[str, ...]:
    """Tell where a method acts; on an embedding if it can do without inputs."""
    if method.kinds:
        return tuple(sorted(method.kinds))
    if action is None:
        return ("layers",)
    outside = example_layer(method, input=None)
    known = Actions({**methods, method.name: method})
    takes = known.refuses(outside, action) is None
    return ("layers", "embedding") if takes else ("layers",)


def _bits(card: MethodCard) -> str:
    return "" if card.bits_per_weight is None else f"{card.bits_per_weight:.2f}"


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words)
