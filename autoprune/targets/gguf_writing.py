"""Writes a GGUF file tensor by tensor; in memory is the layer that is being written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from autoprune.compression.variant import Variant
from autoprune.errors import ExportError
from autoprune.exporting.cutting import kept_units
from autoprune.exporting.digests import digest
from autoprune.exporting.exporter import Digests, ExportJob
from autoprune.exporting.shrinking import Units
from autoprune.policy import Layer, Site
from autoprune.targets.gguf_blocks import Blocks, blocks, chosen, values
from autoprune.targets.gguf_families import head_dim
from autoprune.targets.gguf_header import rope_factors, writer_of
from autoprune.targets.gguf_model import ROPE_FACTORS, Entry, GgufModel
from autoprune.targets.gguf_reading import Place, bitmap

_LOST = 2e-3
"""Most of a layer's numbers that float16 scales may lose, relative to their length.

Scales and minima in their normal range lose up to 2^-11 of themselves; more is lost
only where nearly all scales of a layer are smaller than float16 can tell apart.
"""


class GgufTensors:
    """What is written, tensor by tensor.

    Args:
        model: The dense model, mapped from its file; it stays as it is.
        job: What is exported.
        known: How the model becomes a GGUF file.
        whole: True if the loaded model has zeros where units were left out, and the
            names and shapes of the dense one.

    Attributes:
        digests: Of the layers that have been written, by their names once loaded.
        places: Where each tensor of the dense model went, by its name.
        sites: Bitmaps of the units that stay, by the name of the structure.
    """

    def __init__(
        self, model: Any, job: ExportJob, known: GgufModel, *, whole: bool
    ) -> None:
        self._state: dict[str, Tensor] = model.state_dict()
        self._job, self._known, self._whole = job, known, whole
        self._blocks = known.parts.blocks(job.storages)
        self._names = known.parts.names(job.storages)
        self._units: dict[str, Units] = {}
        self.digests: Digests = {}
        self.places: dict[str, Place] = {}
        self.sites: dict[str, str] = {}

    @property
    def left_out(self) -> list[str]:
        """Names of what the loaded model has and the file has not, once written."""
        if not self._whole:
            return []
        biases = self._known.switches.added(self._known.biases(self._job.storages))
        return [name for name in (*self._state, *biases) if name not in self.places]

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            ExportError: If the layers of a structure do not keep the same units, or a
                layer's scales are too large or too small for the format.
        """
        entries = self._known.entries(self._job.storages)
        arch = self._known.arch(self._blocks)
        assert arch is not None, "such a policy is refused before it is written"
        writer = writer_of(self._known, self._blocks, entries, arch=arch, path=path)
        self._known.tokenizer.add_to(writer)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry, tensor in self._tensors(entries):
                assert tensor.kind is entry.kind, entry
                writer.write_tensor_data(np.ascontiguousarray(tensor.data))
        finally:
            writer.close()
        if self._whole:
            self._tell_left_out()

    def _tensors(self, entries: list[Entry]) -> Iterator[tuple[Entry, Blocks]]:
        last: tuple[Layer, Variant] | None = None  # a bias comes after its weight
        for entry in entries:
            if entry.name == ROPE_FACTORS:
                yield entry, values(rope_factors(self._known.config), entry.kind)
                continue
            if (layer := entry.layer) is None:
                self.places[entry.source] = Place(entry.name)
                yield entry, values(self._state[entry.source], entry.kind)
                continue
            if last is None or last[0] != layer:
                last = layer, self._variant(layer)
            rows, columns = self._lines(layer)
            order = self._paired(layer, rows)
            self.places[entry.source] = self._place(entry)
            if entry.source.endswith("bias"):
                bias = self._bias(layer, last[1])
                yield entry, values(bias[order], entry.kind)
            else:
                made = blocks(last[1], order, columns)
                if last[1].storage.bits is not None:
                    self._check(layer, chosen(last[1].base, order, columns), made)
                told = made.told if order is rows else made.told[_places(order, rows)]
                self._tell(layer, told, rows, columns)
                yield entry, made

    def _variant(self, layer: Layer) -> Variant:
        """Give a layer's variant, which has to store what was declared."""
        variant, declared = self._job.variant(layer), self._job.storages[layer]
        if variant.storage != declared:
            raise ExportError(
                f"the variant of {layer.name!r} stores {variant.storage}, but "
                f"{declared} was declared. The method that made it breaks its contract"
            )
        return variant

    def _check(
        self, layer: Layer, wanted: Float[Tensor, "rows columns"], made: Blocks
    ) -> None:
        """Refuse a layer of which the format would lose too much."""
        exact = wanted.float()
        lost = (made.told - exact).norm() / exact.norm().clamp_min(1e-30)
        # The variant's own rounding to bfloat16 is no loss of the format's.
        allowed = _LOST + torch.finfo(getattr(torch, layer.dtype)).eps / 2
        if not lost <= allowed:  # infinities give NaN
            raise ExportError(
                f"the scales of {layer.name} do not fit the float16 of GGUF's "
                f"{made.kind.name}: {float(lost):.2g} of its weights would be lost, at "
                f"most {allowed:.2g} may be. Leave the layer unquantized, or export as "
                "packed"
            )

    def _tell(
        self,
        layer: Layer,
        told: Float[Tensor, "rows columns"],
        rows: Int[Tensor, " rows"],
        columns: Int[Tensor, " columns"],
    ) -> None:
        """Note what a layer will weigh once loaded."""
        loaded = told.to(getattr(torch, layer.dtype))
        name = layer.name
        if self._whole:
            full = torch.zeros(layer.shape, dtype=loaded.dtype)
            full[rows[:, None], columns] = loaded
            loaded = full
        else:
            new = self._names(f"{name}.")
            assert new is not None, name
            name = new.removesuffix(".")
        self.digests[name] = digest(loaded)

    def _tell_left_out(self) -> None:
        """Note that what is not in the file will be zeros."""
        for layer in self._job.inventory.layers:
            if layer.name not in self.digests:
                zeros = torch.zeros(layer.shape, dtype=getattr(torch, layer.dtype))
                self.digests[layer.name] = digest(zeros)

    def _place(self, entry: Entry) -> Place:
        layer, bias = entry.layer, entry.source.endswith("bias")
        assert layer is not None, entry
        cut = layer.cut
        paired = self._is_paired(layer)
        size = head_dim(self._known.config) if paired else 0
        if cut is None or not self._is_cut(layer) or (bias and cut.axis == "columns"):
            return Place(entry.name, heads=size)
        site = self._job.inventory.group_of(layer).name
        axis = 0 if cut.axis == "rows" else 1
        return Place(entry.name, size, site, axis, cut.unit, cut.units)

    def _bias(self, layer: Layer, variant: Variant) -> Float[Tensor, " out"]:
        """Add a variant's bias to a layer's own, rounded once as in memory."""
        own = self._state.get(f"{layer.name}.bias")
        if variant.bias is None:
            assert own is not None, layer.name
            return own
        total = variant.bias.double() + (0 if own is None else own.double())
        return total.to(getattr(torch, layer.dtype))

    def _is_paired(self, layer: Layer) -> bool:
        return self._known.family.paired and layer.role in ("q_proj", "k_proj")

    def _paired(self, layer: Layer, rows: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Put rows that are rotated together side by side, head by head."""
        if not self._is_paired(layer):
            return rows
        half = head_dim(self._known.config) // 2
        return rows.view(-1, 2, half).transpose(1, 2).flatten()

    def _is_cut(self, layer: Layer) -> bool:
        if layer.cut is None:
            return False
        return self._names.block(layer).of(layer.cut.kind) < layer.cut.units

    def _lines(
        self, layer: Layer
    ) -> tuple[Int[Tensor, " rows"], Int[Tensor, " columns"]]:
        """Tell which rows and columns of a layer stay."""
        rows, columns = map(torch.arange, layer.shape)
        cut = layer.cut
        if cut is None or not self._is_cut(layer):
            return rows, columns
        units = self._kept(self._job.inventory.group_of(layer))
        lines = (units[:, None] * cut.unit + torch.arange(cut.unit)).flatten()
        return (lines, columns) if cut.axis == "rows" else (rows, lines)

    def _kept(self, site: Site) -> Units:
        """Find the units of a structure that stay, the same in all its layers."""
        if site.name in self._units:
            return self._units[site.name]
        first = site.layers[0]
        assert first.cut is not None, site.name
        wanted = self._names.block(first).of(first.cut.kind)
        told = kept_units(first, self._job.variant(first))
        for layer in site.layers:
            found = kept_units(layer, self._job.variant(layer))
            if len(found) != wanted or not torch.equal(told, found):
                raise ExportError(
                    f"{layer.name} keeps {len(found)} units, but {wanted} were "
                    f"declared, the same in all layers of {site.name}. The method "
                    "that removed them is at fault"
                )
        self._units[site.name] = told
        self.sites[site.name] = bitmap(told, first.cut.units)
        return told


def _places(
    order: Int[Tensor, " rows"], rows: Int[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """Tell where in an order each of the rows is."""
    where = torch.empty(int(rows.max()) + 1, dtype=torch.long)
    where[order] = torch.arange(len(order))
    return where[rows]
