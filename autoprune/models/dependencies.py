"""What depends on what in a block: layers that belong together, and their units.

Where the rows of some layers are replaced by noise, the columns that other layers read
change. What is found so is held against the block once more: without the rows of a
unit, it has to give what it gives without their columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from autoprune.models.probing import BlockProbe, Seen

Flow = Mapping[str, set[str]]
"""For each layer, those that read what it gives before any other layer has."""

AFTER, BEFORE = "what the block gives", "what enters the block"
"""Stand beside layers in a flow."""


@dataclass(frozen=True, slots=True)
class Link:
    """Layers whose rows only one layer reads, and all that it reads.

    Attributes:
        makers: Paths of the layers.
        taker: Path of the layer that reads them.
        mixes: True if tokens are mixed in between: an attention.
    """

    makers: tuple[str, ...]
    taker: str
    mixes: bool

    @property
    def layers(self) -> tuple[str, ...]:
        """All of them, the taker last."""
        return (*self.makers, self.taker)


def flow_of(probe: BlockProbe) -> Flow:
    """Tell which layers read what a layer gives before any other layer has."""
    flow = {BEFORE: _reached(probe, probe.frozen(hidden=probe.altered_hidden()))}
    for layer in probe.ran:
        flow[layer] = _reached(probe, probe.frozen({layer: probe.altered(layer)}))
    return flow


def _reached(probe: BlockProbe, seen: Seen) -> set[str]:
    before = probe.first
    read = {n for n in probe.ran if not _equal(seen.read.get(n), before.read[n])}
    return read if torch.equal(seen.after, before.after) else read | {AFTER}


def _equal(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and torch.equal(one, other)


def links_of(probe: BlockProbe, flow: Flow) -> tuple[list[Link], list[str]]:
    """Find the layers of which another one reads the rows, and nothing else.

    Args:
        probe: Of the block.
        flow: From ``flow_of``.

    Returns:
        The layers that belong together, in the order of those that read; notes where
        something else reads as well, or is read.
    """
    links, notes = [], []
    for taker in probe.ran:
        makers = tuple(name for name in probe.ran if taker in flow[name])
        alone = [name for name in makers if flow[name] == {taker}]
        others = [name for name in makers if name not in alone]
        others += [BEFORE] * (taker in flow[BEFORE])
        if alone and others:
            notes.append(
                f"no structure of {alone[0]} and {taker}: it also reads {others[0]}, "
                "which others read"
            )
        elif alone:
            first = {name: probe.altered(name, tokens=1) for name in makers}
            try:
                mixes = bool(_difference(probe, first, taker)[1:].any())
                links.append(Link(makers, taker, mixes))
            except ValueError as why:
                notes.append(f"no structure of {taker}: {why}")
    for name in probe.ran:
        if len(flow[name]) > 1 and AFTER not in flow[name]:
            takers = " and ".join(one for one in probe.ran if one in flow[name])
            notes.append(f"no structure of {name}: {takers} read it")
    return links, notes


def units_of(probe: BlockProbe, link: Link) -> int:
    """Count the units of layers that belong together.

    Args:
        probe: Of the block.
        link: The layers. One unit is as many rows of each maker, one after the other,
            and as many columns of the taker.

    Raises:
        ValueError: If no unit can go alone; tells why.
    """
    units = _most_units(probe, link)
    _check_units(probe, link, units)
    _check_weights(probe, link, units)
    return units


def _most_units(probe: BlockProbe, link: Link) -> int:
    """Count the units: the most of which the first depends on no row of another.

    Raises:
        ValueError: If that leaves one.
    """
    width = probe.first.read[link.taker].shape[1]
    sizes = [probe.rows(name) for name in link.makers]
    for units in range(width, 1, -1):
        if any(size % units for size in (width, *sizes)):
            continue
        chosen = torch.arange(units) == 0
        if not (_changed(probe, link, chosen) & ~_spread(chosen, width)).any():
            return units
    for name in link.makers:
        row = torch.arange(probe.rows(name)) == 0
        noise = {name: probe.altered(name, rows=row)}
        if _difference(probe, noise, link.taker).any(0).float().mean() > 0.5:
            raise ValueError(
                f"one row of {name} reaches most columns of {link.taker}: a norm over "
                "all of them, or a single group of heads. No unit can go alone"
            )
    raise ValueError(
        f"the rows of {' and '.join(link.makers)} that make a unit of {link.taker} do "
        "not lie together, as in a matrix that is several in one"
    )


def _check_units(probe: BlockProbe, link: Link, units: int) -> None:
    """Make sure that rows of a unit reach its own columns, and no others.

    The numbers of two units differ in a digit, so it is enough to let all units go
    together that have the same one.
    """
    width = probe.first.read[link.taker].shape[1]
    numbers, reached = torch.arange(units), torch.zeros(width, dtype=torch.bool)
    for digit in range((units - 1).bit_length()):
        for value in (0, 1):
            chosen = (numbers >> digit) % 2 == value
            changed = _changed(probe, link, chosen)
            if (changed & ~_spread(chosen, width)).any():
                raise ValueError(
                    f"its {units} units depend on each other between "
                    f"{link.makers[0]} and {link.taker}"
                )
            reached |= changed
    if not reached.all():
        column = int((~reached).nonzero()[0])
        raise ValueError(f"no row of {link.makers[0]} reaches column {column}")


def _check_weights(probe: BlockProbe, link: Link, units: int) -> None:
    """Make sure that rows are of no use once their columns are zeros, and no harm."""
    width = probe.first.read[link.taker].shape[1]
    for parity in (0, 1):
        gone = torch.arange(units) % 2 == parity
        columns = probe.zeroed(link.taker, _spread(gone, width), axis="columns")
        weights = dict(columns)
        for name in link.makers:
            lines = _spread(gone, probe.rows(name))
            weights |= probe.zeroed(name, lines, axis="rows")
        untaken = probe.run(weights=columns).after
        if not torch.equal(probe.run(weights=weights).after, untaken):
            raise ValueError(
                f"without rows of {link.makers[0]} the block gives something else than "
                f"without their columns of {link.taker}"
            )


def _changed(
    probe: BlockProbe, link: Link, chosen: Bool[Tensor, " units"]
) -> Bool[Tensor, " columns"]:
    """Tell which columns of the taker change with the rows of some units."""
    answers = {
        name: probe.altered(name, rows=_spread(chosen, probe.rows(name)))
        for name in link.makers
    }
    return _difference(probe, answers, link.taker).any(0)


def _difference(
    probe: BlockProbe, answers: Mapping[str, Tensor], taker: str
) -> Bool[Tensor, "tokens columns"]:
    """Tell what a layer reads in another way if others answer so."""
    before, read = probe.first.read[taker], probe.frozen(answers).read.get(taker)
    if read is None or read.shape != before.shape:
        raise ValueError(f"which tokens {taker} reads depends on their values")
    return (read != before).cpu()


def _spread(chosen: Bool[Tensor, " units"], lines: int) -> Bool[Tensor, " lines"]:
    return chosen.repeat_interleave(lines // len(chosen))
