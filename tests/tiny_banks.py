"""Banks of one tiny model and one folder, with toy methods."""

from collections.abc import Mapping
from pathlib import Path

import torch
from autoprune_plugins.architectures import register_architectures
from torch import Tensor, nn
from toy_methods import toys

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.models.layers import inventory
from autoprune.models.text import TokenWindows
from autoprune.policy import Action, Layer


def windows(seed: int = 0) -> TokenWindows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (5, 12), generator=generator)
    return TokenWindows(ids, "statistics", "test", f"{seed:016x}")


class Bench:
    """Opens banks of one model and one folder."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model = model
        self.found = inventory(model, register_architectures())
        self.layers = [layer for layer in self.found.layers if layer.block is not None]
        self.stitched = StitchedModel(model, self.found.layers)
        self.toys = toys()
        self.store = VariantStore(folder, 10**9)

    def bank(
        self,
        reference: Mapping[Layer, Action] | None = None,
        *,
        seed: int = 0,
        revision: str = "r1",
    ) -> VariantBank:
        return VariantBank(
            self.stitched,
            self.found,
            Actions(self.toys),
            self.store,
            windows(seed),
            revision,
            reference or {},
            batch=2,
        )

    def calls(self, name: str) -> int:
        return len(self.toys[name].calls)

    def layer(self, end: str) -> Layer:
        return next(layer for layer in self.layers if layer.name.endswith(end))


def same(one: Variant, other: Variant) -> bool:
    return one.storage == other.storage and torch.equal(one.weight, other.weight)


def inputs_of(model: nn.Module, layer: Layer) -> Tensor:
    """Catch what a layer reads in ordinary forward passes."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer.name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, -2))
    )
    for ids in windows().ids.split(2):
        model(ids)
    handle.remove()
    return torch.cat(seen)


def kept_columns(variant: Variant) -> list[int]:
    assert variant.mask is not None
    return variant.mask[0].nonzero()[:, 0].tolist()


def best_columns(inputs: Tensor, keep: int = 8) -> list[int]:
    return sorted(inputs.float().square().sum(0).topk(keep).indices.tolist())
