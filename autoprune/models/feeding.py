"""Tells an inventory how the body of its model is given windows that are no tokens."""

from collections import Counter
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from autoprune.models.blocks import BlockRunner
from autoprune.models.computing import computing_in
from autoprune.models.layers import Feed, Inventory
from autoprune.policy import Layer, Site


def fed(
    model: nn.Module,
    inventory: Inventory,
    feed: Feed | None,
    window: Int[Tensor, "1 length"],
) -> Inventory:
    """Give the inventory with a feed, and with how often a window uses each layer.

    A convolution meets so many patches of an image, which is what it costs to compute.
    Nothing changes where windows are tokens, each of which a layer meets once.

    Args:
        model: The model, left as it was; it runs once, in float32.
        inventory: Its layers.
        feed: Of the task; None where windows are tokens.
        window: One window.
    """
    if feed is None:
        return inventory
    met: Counter[str] = Counter()

    def count(name: str, rows: Float[Tensor, "tokens in"]) -> None:
        met[name] += len(rows)

    inventory = replace(inventory, feed=feed)
    with computing_in(model, torch.float32, copy=True), torch.no_grad():
        runner = BlockRunner(model, inventory, window)
        hidden = runner.start()
        for block in range(len(inventory.blocks)):
            hidden = runner.collect(block, hidden, count)

    def used(layer: Layer) -> Layer:
        return replace(layer, uses=float(met[str(layer.input)]))

    def all_used(sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(
            replace(site, layers=tuple(map(used, site.layers))) for site in sites
        )

    return replace(
        inventory, sites=all_used(inventory.sites), groups=all_used(inventory.groups)
    )
