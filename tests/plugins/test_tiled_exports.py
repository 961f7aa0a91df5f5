"""Both export targets write tiled variants, and read back the same model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from autoprune_plugins.gptq import Gptq
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.packed import WEIGHTS, Packed
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.transformers_folder import TransformersFolder
from tiny_exports import Case, tiny_case

from autoprune.compression.actions import Actions
from autoprune.compression.method import Source
from autoprune.compression.variant import Variant
from autoprune.errors import ExportError
from autoprune.exporting.marker import MARKER
from autoprune.models.layers import read_weight, write_weight
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Action, Layer

PACKED, PLAIN = Packed(), TransformersFolder()
ACTIONS = Actions({m.name: m for m in (Magnitude(), RoundToNearest(), Gptq())})
TEXTS = [
    "magnitude(sparsity=0.5, tile=1x8)",
    "magnitude(per=layer, sparsity=0.4, tile=8x8)",
    "magnitude(norm=l2, sparsity=0.3, tile=row)",
    "magnitude(norm=variance, sparsity=0.3, tile=column)",
    "magnitude(sparsity=0.5, tile=2x4) + rtn(bits=3, group=8)",
]


def variant_of(weight: torch.Tensor, layer: Layer, action: Action) -> Variant:
    variant = Variant.dense(weight)
    for step in action.steps:
        method, settings = ACTIONS.method(step), ACTIONS.settings(step)
        source = Source(layer, variant)
        variant = method.compress([source], NO_STATISTICS, [settings])[0][0]
    return variant


def tiled_case(text: str, folder: Path) -> Case:
    """Put one action on every layer, with the storages that methods declare."""
    case, action = tiny_case("llama", folder, ["dense"]), Action.parse(text)
    variants = {
        layer: variant_of(read_weight(case.dense, layer).clone(), layer, action)
        for layer in case.job.storages
    }
    for layer, variant in variants.items():
        write_weight(case.model, layer, variant.weight)
    job = replace(
        case.job,
        storages={layer: ACTIONS.storage(layer, action) for layer in variants},
        variant=variants.__getitem__,
        actions=dict.fromkeys(variants, action),
    )
    return replace(case, job=job)


@pytest.mark.parametrize("text", TEXTS)
def test_tiles_come_back_bit_for_bit(text: str, tmp_path: Path) -> None:
    case = tiled_case(text, tmp_path / "dense")
    for exporter in (PACKED, PLAIN):
        folder = tmp_path / exporter.name
        folder.mkdir()
        exporter.write(folder, case.job)
        assert torch.equal(case.logits(exporter.load(folder)), case.logits())
        predicted = exporter.size_bytes(case.job.storages, case.untouched)
        assert exporter.written_bytes(folder) == predicted


def test_a_tile_costs_one_bit(tmp_path: Path) -> None:
    vectors = tiled_case("magnitude(sparsity=0.5, tile=1x8)", tmp_path / "vectors")
    single = tiled_case("magnitude(sparsity=0.5)", tmp_path / "single")
    saved = 0
    for layer, storage in vectors.job.storages.items():
        other = single.job.storages[layer]
        # A row of 48 has 6 vectors and loses 3 of them: the counts are the same.
        assert storage.kept == other.kept
        assert other.nbytes - storage.nbytes == layer.numel // 8 - layer.numel // 64
        saved += layer.numel // 8 - layer.numel // 64
    sizes = [
        PACKED.size_bytes(case.job.storages, case.untouched)
        for case in (single, vectors)
    ]
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=200)  # the header's digits


@pytest.mark.parametrize("mask", ["0x8", "3x5", "1xa", "1x2x3", "tiles"])
def test_a_damaged_tile_is_told(mask: str, tmp_path: Path) -> None:
    case = tiled_case("magnitude(sparsity=0.5, tile=1x8)", tmp_path / "dense")
    folder = tmp_path / "export"
    folder.mkdir()
    PACKED.write(folder, case.job)
    marker = json.loads((folder / MARKER).read_text())
    marker["layers"]["model.layers.0.self_attn.o_proj"]["mask"] = mask
    (folder / MARKER).write_text(json.dumps(marker))
    assert (folder / WEIGHTS).is_file()
    with pytest.raises(ExportError, match="o_proj' stores .*Export the model again"):
        PACKED.load(folder)
