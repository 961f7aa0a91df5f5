"""Names and sizes of all tensors that a policy becomes in compressed-tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from autoprune.compression.storage import Part, Storage
from autoprune.exporting.cutting import Cutter
from autoprune.exporting.shrinking import Remains, shrunk_state
from autoprune.models.layers import Inventory
from autoprune.models.weights import dtype_name, parameter_of
from autoprune.policy import Layer
from autoprune.targets.compressed_tensors_schemes import Scheme

SchemeOf = Callable[[Layer, Storage], Scheme | None]
"""Tells how a layer is quantized; None if it is written as values."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A quantized layer of the model that is written.

    Attributes:
        layer: The layer, as it was before any cut.
        scheme: How it is quantized.
        stem: Its name in the file; in memory it may have another.
    """

    layer: Layer
    scheme: Scheme
    stem: str


@dataclass(frozen=True, eq=False)
class Layout:
    """What is written of a model under one policy.

    Attributes:
        remains: What stays of the model.
        small: The model that stays, without weights.
        parts: Every tensor by its name in the file, in the order in which it comes.
        coded: The quantized layers, by the names that their weights have in memory.
    """

    remains: Remains
    small: Any
    parts: Mapping[str, Part]
    coded: Mapping[str, Coded]

    def targets(self) -> dict[Scheme, list[str]]:
        """List the modules of each scheme, by the names in memory and in the file."""
        found: dict[Scheme, list[str]] = {}
        for name, coded in self.coded.items():
            names = dict.fromkeys((name.removesuffix(".weight"), coded.stem))
            found.setdefault(coded.scheme, []).extend(names)
        return found

    def ignored(self) -> list[str]:
        """List whatever has a matrix that is not quantized, but for embeddings.

        Runtimes want the name of each such module that they might have a kernel for:
        linear layers, the head, experts and what chooses among them.
        """
        found = []
        for name, module in self.small.named_modules():
            coded = f"{name}.weight" in self.coded
            if isinstance(module, nn.Linear) and not coded:
                found.append(name)
        known = {coded.stem for coded in self.coded.values()}
        for name, part in self.parts.items():
            stem = name.removesuffix(".weight")
            if stem != name and len(part.shape) == 2 and stem not in known:
                found.append(stem)
        tables = {
            stem
            for name, module in self.small.named_modules()
            if isinstance(module, nn.Embedding)
            for stem in on_disk(self.small, f"{name}.weight", module.weight)
        }
        return [n for n in dict.fromkeys(found) if f"{n}.weight" not in tables]


class Layouts:
    """Makes the layout of any policy of one model.

    Args:
        cutter: How the model can be cut.
        inventory: Its layers.
        scheme_of: How layers are quantized.
    """

    def __init__(
        self, cutter: Cutter, inventory: Inventory, scheme_of: SchemeOf
    ) -> None:
        self._cutter = cutter
        self._inventory = inventory
        self._scheme_of = scheme_of
        self._plain: dict[Remains, dict[str, dict[str, Part]]] = {}

    @cached_property
    def splits_experts(self) -> bool:
        """True if transformers saves some parameter of the model as several tensors."""
        small, state = self._cutter.empty(self._cutter.whole)
        return any(len(on_disk(small, name, state[name])) > 1 for name in state)

    def of(self, storages: Mapping[Layer, Storage]) -> Layout:
        """Give the layout of a policy.

        Args:
            storages: What every layer stores.
        """
        remains = self._cutter.decide(storages)[0]
        small, state = self._cutter.empty(remains)
        if remains not in self._plain:
            self._plain[remains] = {
                name: {n: _part(t) for n, t in on_disk(small, name, tensor).items()}
                for name, tensor in state.items()
            }
        plain = self._plain[remains]
        coded, shapes = {}, {}
        for layer, storage in storages.items():
            scheme = self._scheme_of(layer, storage)
            name = self.renamed(parameter_of(layer.name), remains)
            if scheme is None or name is None:
                continue
            (stored,) = plain[name]
            coded[name] = Coded(layer, scheme, stored.removesuffix(".weight"))
            rows, columns = state[name].shape
            shapes[name] = replace(storage, shape=(rows, columns))
        parts: dict[str, Part] = {}
        for name, stored_parts in plain.items():
            if name not in coded:
                parts |= stored_parts
                continue
            stem, scheme = coded[name].stem, coded[name].scheme
            made = scheme.parts(shapes[name])
            parts |= {f"{stem}.{key}": part for key, part in made.items()}
        return Layout(remains, small, parts, coded)

    def renamed(self, name: str, remains: Remains) -> str | None:
        """Tell what a tensor is called once blocks are left out; None if it goes."""
        one = {name: torch.empty(0, device="meta")}
        small = shrunk_state(
            nn.Module(), one, remains, inventory=self._inventory, kept={}
        )
        return next(iter(small), None)


def on_disk(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Give a tensor as transformers saves it: renamed, or experts one by one."""
    return dict(revert_weight_conversion(model, {name: tensor}))


def _part(tensor: Tensor) -> Part:
    return Part(dtype_name(tensor), tuple(tensor.shape))
