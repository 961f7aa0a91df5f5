"""What layers need, under the actions that are wanted of them."""

from collections.abc import Iterable, Mapping

from autoprune.compression.actions import Actions
from autoprune.models.gradients import GRADIENTS
from autoprune.models.layers import Inventory
from autoprune.models.statistics import Gathering
from autoprune.policy import Action, Layer, Site, Step

Pairs = Iterable[tuple[Layer, Action]]


def by_layer(pairs: Pairs) -> dict[Layer, list[Action]]:
    """Line up the actions of each layer."""
    grouped: dict[Layer, list[Action]] = {}
    for layer, action in pairs:
        grouped.setdefault(layer, []).append(action)
    return grouped


def structured_steps(
    actions: Actions, inventory: Inventory, wanted: Mapping[Layer, list[Action]]
) -> dict[tuple[Site, str], dict[Step, None]]:
    """Name the first steps that act on whole sites, by site and method."""
    found: dict[tuple[Site, str], dict[Step, None]] = {}
    for layer, own in wanted.items():
        for action in own:
            if actions.is_structured(action):
                first = action.steps[0]
                kinds = actions.method(first).kinds
                place = inventory.group_of(layer, kinds), first.method
                found.setdefault(place, {})[first] = None
    return found


def gatherings(
    actions: Actions, inventory: Inventory, pairs: Pairs
) -> dict[str, Gathering]:
    """Begin to gather what methods read of each input."""
    needs: dict[str, set[str]] = {}
    widths: dict[str, int] = {}
    for layer, action in pairs:
        for one in _concerned(actions, inventory, layer, action):
            if one.input is not None:
                needs.setdefault(one.input, set()).update(actions.needs(action))
                widths[one.input] = one.shape[1]
    return {name: Gathering(need, widths[name]) for name, need in needs.items()}


def gradient_needs(
    actions: Actions, inventory: Inventory, pairs: Pairs
) -> dict[Layer, set[str]]:
    """Tell which gradients methods read, of which layers."""
    needs: dict[Layer, set[str]] = {}
    for layer, action in pairs:
        wanted = actions.needs(action) & GRADIENTS
        if wanted:
            for one in _concerned(actions, inventory, layer, action):
                needs.setdefault(one, set()).update(wanted)
    return needs


def _concerned(
    actions: Actions, inventory: Inventory, layer: Layer, action: Action
) -> tuple[Layer, ...]:
    """Name the layers that an action looks at: a whole site, or the layer alone."""
    if not actions.is_structured(action):
        return (layer,)
    return inventory.group_of(layer, actions.method(action.steps[0]).kinds).layers
