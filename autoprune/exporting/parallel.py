"""Tensor parallelism: what must divide so that several GPUs can share every layer.

Servers divide q, k, v, gate and up by their rows, whole heads to each GPU, and o and
down by their columns, so that each GPU needs only what it made itself. A layer is good
for that if each GPU's share of it is a layer that the target could hold alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoprune.compression.storage import BITMAP, Storage
from autoprune.errors import ConfigError
from autoprune.exporting.exporter import Exporter
from autoprune.models.layers import Inventory
from autoprune.models.weights import expert_of, parameter_of
from autoprune.policy import Layer

ROWS, COLUMNS = 0, 1
"""Axis of ``[out, in]`` along which a layer is divided."""

_BY_SITE = {"qkv": ROWS, "gate_up": ROWS, "up": ROWS, "o": COLUMNS, "down": COLUMNS}
"""How layers are divided by what their sites are called, where nothing else tells."""

_PLANS = {"colwise": ROWS, "rowwise": COLUMNS}
"""The same by transformers' words, which see weights as ``[in, out]``."""


@dataclass(frozen=True)
class Heads:
    """The heads of a model's attention.

    Attributes:
        queries: Number of query heads.
        keys: Number of heads of keys and values, each for as many query heads.
        size: Rows of one head.
    """

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, model: Any) -> "Heads":
        """Read them from a model's configuration."""
        config = model.config.get_text_config()
        queries = getattr(config, "num_attention_heads", None) or 1
        keys = getattr(config, "num_key_value_heads", None) or queries
        size = getattr(config, "head_dim", None) or config.hidden_size // queries
        return cls(queries, keys, size)

    def kept(self, groups: int) -> "Heads":
        """Tell them where only so many heads of keys and values stay."""
        return Heads(self.queries // self.keys * groups, groups, self.size)

    def refuses(self, ways: int) -> str | None:
        """Say why so many GPUs cannot share them, or None; keys may be repeated."""
        if self.queries % ways:
            return f"{self.queries} attention heads"
        if self.keys % ways and ways % self.keys:
            return f"{self.keys} heads of keys and values"
        return None


@dataclass(frozen=True)
class TensorParallel:
    """How a model is divided among GPUs.

    Attributes:
        ways: How many GPUs.
        axes: Axis along which each layer is divided; a layer that every GPU has as a
            whole is absent.
        heads: The heads of its attention.
    """

    ways: int
    axes: Mapping[Layer, int]
    heads: Heads

    @classmethod
    def of(cls, model: Any, inventory: Inventory, ways: int) -> "TensorParallel":
        """Find out how a model is divided.

        Where transformers has a plan for the model it decides; else the structures of
        the model, or the names of its sites.

        Args:
            model: The model, on any device.
            inventory: Its layers.
            ways: How many GPUs.

        Raises:
            ConfigError: If the model cannot be divided among so many.
        """
        axes = _axes(model, inventory)
        if not axes:
            raise ConfigError(
                f"tensor_parallel: nothing tells how the layers of a "
                f"{type(model).__name__} are divided. Leave it out"
            )
        found = cls(ways, axes, Heads.of(model))
        if reason := found._misfit():
            counts = range(1, found.heads.queries + 1)
            fits = [n for n in counts if replace(found, ways=n)._misfit() is None]
            raise ConfigError(
                f"tensor_parallel: {ways} GPUs cannot share the model's {reason} "
                f"evenly. It can be {', '.join(map(str, fits))}"
            )
        return found

    def refuses(self, layer: Layer, storage: Storage, exporter: Exporter) -> str | None:
        """Say why GPUs cannot share a layer so stored, or None.

        Args:
            layer: The layer.
            storage: What it stores. Where units are removed it has to fit both cut and
                with zeros in their place, as a target may do either.
            exporter: The target, which has to hold each GPU's part of the codes.
        """
        axis = self.axes.get(layer)
        if axis is None or not storage.kept and not storage.low_rank:
            return None
        if reason := self._refuses_units(layer, storage):
            return reason
        for size in self._sizes(layer, storage, axis):
            part = size // self.ways_of(layer)
            if reason := self._refuses_part(storage, axis, part):
                return (
                    f"with {self.ways} GPUs each has {part} of {size} "
                    f"{('outputs', 'inputs')[axis]}, {reason}, or fewer GPUs"
                )
            if reason := self._refuses_codes(layer, storage, axis, part, exporter):
                return f"as one of {self.ways} GPUs would have to hold it, {reason}"
        return None

    def ways_of(self, layer: Layer) -> int:
        """Tell among how many a layer is divided: keys are repeated where few."""
        keys = self.heads.keys
        makes_keys = layer.shape[0] == keys * self.heads.size and _is_attention(layer)
        return min(self.ways, keys) if makes_keys else self.ways

    def _misfit(self) -> str | None:
        """Say what of the dense model does not divide, or None."""
        if reason := self.heads.refuses(self.ways):
            return reason
        for layer, axis in self.axes.items():
            if layer.shape[axis] % self.ways_of(layer):
                sides = "outputs", "inputs"
                return f"{layer.shape[axis]} {sides[axis]} of {layer.name}"
        return None

    def _refuses_units(self, layer: Layer, storage: Storage) -> str | None:
        """Say why GPUs cannot share the units that stay, or None."""
        if storage.units is None or layer.cut is None:
            return None
        kept, kind, ways = storage.units, layer.cut.kind, self.ways
        fits = kept % ways == 0
        if kind == "heads":
            fits = self.heads.kept(kept).refuses(ways) is None
        if fits:
            return None
        return (
            f"{ways} GPUs cannot share the {kept} of {layer.cut.units} {kind} evenly "
            f"that it keeps. Keep a multiple of {ways}, or none of its zeros as units"
        )

    def _sizes(self, layer: Layer, storage: Storage, axis: int) -> set[int]:
        """Give the rows or columns that are divided: all, and those that are left."""
        sizes = {layer.shape[axis]}
        if storage.units is not None and layer.cut is not None:
            sizes.add(storage.units * layer.cut.unit)
        return sizes

    def _refuses_part(self, storage: Storage, axis: int, part: int) -> str | None:
        """Say why a GPU's rows or columns tear apart what belongs together, or None."""
        if axis == COLUMNS and storage.group and part % storage.group:
            return (
                f"and {storage.group} in a row share a scale. Take a group that "
                f"divides {part}, or one scale a row"
            )
        if storage.mask is None or storage.mask == BITMAP or storage.units is not None:
            return None
        if ":" in storage.mask:
            of = int(storage.mask.split(":")[1]) if axis == COLUMNS else 1
        else:
            of = storage.tile[axis]
        if part % of:
            return (
                f"and the pattern {storage.mask} goes by {of}. Take a pattern that "
                f"divides {part}, or none"
            )
        return None

    def _refuses_codes(
        self, layer: Layer, storage: Storage, axis: int, part: int, exporter: Exporter
    ) -> str | None:
        """Say why the target could not hold a GPU's part of the codes, or None."""
        if storage.bits is None:
            return None
        rows, columns = layer.shape
        shape = (part, columns) if axis == ROWS else (rows, part)
        codes = replace(
            storage, shape=shape, kept=shape[0] * shape[1], mask=None, units=None
        )
        return exporter.refuses(
            replace(layer, shape=shape), replace(codes, bias=False, permuted=False)
        )


def _axes(model: Any, inventory: Inventory) -> dict[Layer, int]:
    """Tell along which axis each layer is divided."""
    config = model.config.get_text_config()
    plan = getattr(config, "base_model_tp_plan", None) or {}
    planned = [
        (re.compile(r"(?:.*\.)?" + re.escape(name).replace(r"\*", r"\d+")), axis)
        for name, style in plan.items()
        for word, axis in _PLANS.items()
        if word in style
    ]
    found: dict[Layer, int] = {}
    for site in inventory.sites:
        named = [_BY_SITE[part] for part in site.name.split(".") if part in _BY_SITE]
        for layer in site.layers:
            expert = expert_of(layer.name)
            name = parameter_of(layer.name) if expert else layer.name
            axes = [axis for pattern, axis in planned if pattern.fullmatch(name)]
            if layer.cut is not None and layer.cut.kind in ("channels", "heads"):
                axes.append(ROWS if layer.cut.axis == "rows" else COLUMNS)
            if axes := axes + named:
                found[layer] = axes[0]
    return found


def _is_attention(layer: Layer) -> bool:
    """Tell whether a layer may make keys or values."""
    if layer.cut is not None:
        return layer.cut.kind == "heads" and layer.cut.axis == "rows"
    return layer.role in ("k_proj", "v_proj", "key", "value")
