"""Knobs: few numbers that bend what the choices of many sites cost."""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float

from autoprune.policy import Action, Site
from autoprune.searching.space import SearchSpace

ROLES = 8
"""Most knobs for roles; those of the most sites have one, all others stay at zero."""


DEPTHS = 5
"""Most knobs for depth, spread evenly over the blocks, and linear in between."""


FAMILIES = 6
"""Most knobs for kinds of actions: methods first, then parameters, widest first."""


LEVELS = frozenset({"bits", "sparsity"})
"""Parameters that say how much, not how: the sensitivities tell them apart."""


Table = Float[np.ndarray, "sites choices"]


Knobs = Mapping[str, Table]
"""By name, how strongly a knob acts on every choice, in [0, 1]."""


def knobs_of(space: SearchSpace) -> Knobs:
    """Name the knobs of a space, at most 20, and what each acts on.

    A kind that all choices share has no knob: one factor on all costs changes nothing.
    """
    return {**_roles(space), **_depths(space), **_families(space)}


def bend(costs: Table, knobs: Knobs, values: Mapping[str, float]) -> Table:
    """Multiply costs by what the knobs say, each a natural logarithm."""
    power = np.zeros(costs.shape)
    for name, value in values.items():
        power += value * knobs[name]
    bent: Table = costs * np.exp(power)
    return bent


def free_sites(space: SearchSpace) -> dict[int, Site]:
    """Give the sites that have a choice, by their row."""
    pairs = enumerate(space.sites)
    return {row: site for row, site in pairs if len(space.choices[site.name]) > 1}


def _blank(space: SearchSpace) -> Table:
    return np.zeros((len(space.sites), max(map(len, space.choices.values()))))


def _roles(space: SearchSpace) -> Knobs:
    found: dict[str, list[int]] = {}
    for row, site in free_sites(space).items():
        found.setdefault(_role(site), []).append(row)
    order = sorted(found, key=lambda role: (-len(found[role]), role))
    knobs = {f"role {role}": _blank(space) for role in order[:ROLES]}
    for role, acts in zip(order, knobs.values(), strict=False):
        acts[found[role]] = 1.0
    return knobs if len(found) > 1 else {}


def _role(site: Site) -> str:
    """Name what a site is in its block: its layers' role, else its own last part."""
    roles = {layer.role for layer in site.layers}
    return roles.pop() if len(roles) == 1 else site.name.rpartition(".")[2]


def _depths(space: SearchSpace) -> Knobs:
    first = {row: site.layers[0] for row, site in free_sites(space).items()}
    blocks = {row: at.block for row, at in first.items() if at.block is not None}
    count = min(DEPTHS, len(set(blocks.values())))
    knobs = {f"depth {number}": _blank(space) for number in range(count)}
    if count < 2:
        return {}
    knots = np.linspace(min(blocks.values()), max(blocks.values()), count)
    for hat, acts in zip(np.eye(count), knobs.values(), strict=True):
        for row, block in blocks.items():
            acts[row] = np.interp(block, knots, hat)
    return knobs


def _families(space: SearchSpace) -> Knobs:
    """Mark the choices of each method and of each parameter that is no level."""
    cells: dict[int, list[tuple[int, int]]] = {}  # by identity: sites share actions
    actions: dict[int, Action] = {}
    for row, site in free_sites(space).items():
        for column, action in enumerate(space.choices[site.name]):
            actions[id(action)] = action
            cells.setdefault(id(action), []).append((row, column))
    every = _blank(space)
    marked: dict[tuple[bool, str], Table] = {}
    for key, action in actions.items():
        where = tuple(np.array(cells[key]).T)
        every[where] = bool(action.steps)
        for kind in _kinds(action):
            marked.setdefault(kind, _blank(space))[where] = 1.0
    # What acts on all that is not dense, or as another knob does, adds nothing.
    seen = {every.tobytes()}
    knobs: dict[str, Table] = {}
    for kind in sorted(marked, key=lambda kind: (kind[0], -marked[kind].sum(), kind)):
        if len(knobs) < FAMILIES and marked[kind].tobytes() not in seen:
            seen.add(marked[kind].tobytes())
            knobs[f"action {kind[1]}"] = marked[kind]
    return knobs


def _kinds(action: Action) -> Iterator[tuple[bool, str]]:
    """Give the methods and other parameters of an action; True for a parameter."""
    for step in action.steps:
        yield False, step.method
        for name, value in step.params:
            if name not in LEVELS:
                yield True, f"{step.method} {name}={value}"
