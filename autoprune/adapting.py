"""Takes a policy to a model of another depth: by relative depth and type of site."""

import re
from dataclasses import replace
from difflib import get_close_matches

from autoprune.errors import PolicyError
from autoprune.models.layers import Inventory
from autoprune.policy import Action, Policy

_IN_BLOCK = re.compile(r"blocks\.(\d+)(\..+)?")


def adapted(policy: Policy, inventory: Inventory) -> Policy:
    """Give every block the actions of the block at the same relative depth.

    The middle of block ``i`` of ``n`` lies at ``(i + 0.5) / n`` of the depth; sites
    outside of all blocks keep their actions. Widths need not be equal: an action names
    ratios, patterns and bits, and a method refuses a layer that it does not fit.

    Args:
        policy: Of a model of the same family.
        inventory: Of the model that it is taken to.

    Raises:
        PolicyError: If the policy names no blocks, or sites that the model does not
            have in its blocks.
    """
    blocks: dict[int, dict[str, Action]] = {}
    outside: dict[str, Action] = {}
    for site, action in policy.items():
        if match := _IN_BLOCK.fullmatch(site):
            blocks.setdefault(int(match[1]), {})[match[2] or ""] = action
        else:
            outside[site] = action
    if not blocks or sorted(blocks) != list(range(len(blocks))):
        raise PolicyError(
            "a policy can be taken to another depth if it names the sites of every "
            f"block, as blocks.0.qkv; found blocks {sorted(blocks)}"
        )
    known = _places(inventory)
    actions: dict[str, Action] = {}
    for index in range(len(inventory.blocks)):
        source = int((index + 0.5) / len(inventory.blocks) * len(blocks))
        for part, action in blocks[source].items():
            actions[f"blocks.{index}{part}"] = action
    actions |= outside
    if strange := [name for name in actions if name not in known]:
        near = get_close_matches(strange[0], known, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise PolicyError(
            f"the model has no site {strange[0]!r}, and {len(strange) - 1} others that "
            "the policy names at this depth: it is of another family, or its sites are "
            f"divided otherwise.{hint}"
        )
    return replace(policy, actions=actions)


def _places(inventory: Inventory) -> set[str]:
    """Name whatever a policy may act on: sites, their layers, groups of them."""
    names = {site.name for site in (*inventory.sites, *inventory.groups)}
    parts = {site.part(la) for site in inventory.sites for la in site.layers}
    return names | parts
