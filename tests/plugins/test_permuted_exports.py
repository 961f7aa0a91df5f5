"""Patterns that hold in another order of columns: stored with it, or folded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.packed import Packed
from autoprune_plugins.transformers_folder import TransformersFolder
from tiny_exports import Case
from tiny_sites import site_case
from torch import Tensor

from autoprune.errors import ExportError
from autoprune.exporting.exporter import Exporter
from autoprune.exporting.folding import fold
from autoprune.models.layers import read_weight

RIA = "ria(pattern=2:4, permute=true)"
RTN = " + rtn(bits=4, group=8)"
KINDS = ["llama", "qwen2", "gemma2", "olmo2", "gpt2", "opt", "bert"]


def written(case: Case, folder: Path, exporter: Exporter) -> Any:
    folder.mkdir()
    exporter = exporter.for_model(case.dense, case.job.inventory)
    assert not any(exporter.refuses(la, s) for la, s in case.job.storages.items())
    exporter.write(folder, case.job)
    predicted = exporter.size_bytes(case.job.storages, case.untouched)
    assert exporter.written_bytes(folder) == predicted
    return exporter.load(folder)


def follows(weight: Tensor, keep: int, of: int) -> bool:
    return bool(((weight != 0).reshape(-1, of).sum(1) <= keep).all())


def permuted_case(kind: str, folder: Path, **changes: Any) -> Case:
    """Prune all layers that take channels; in one block their makers are rounded."""
    up = "gate_up" if kind in ("llama", "qwen2", "gemma2", "olmo2") else "up"
    policy = {
        "blocks.0.down": RIA,
        "blocks.1.down": RIA + RTN,
        f"blocks.1.{up}": "rtn(bits=4, group=8)",
    }
    return site_case(kind, folder, policy, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_stores_the_order(kind: str, tmp_path: Path) -> None:
    case = permuted_case(kind, tmp_path / "dense")
    model = written(case, tmp_path / "export", Packed())
    assert torch.equal(case.logits(model), case.logits())
    marker = json.loads((tmp_path / "export" / "autoprune.json").read_text())
    assert sum(layer["permuted"] for layer in marker["layers"].values()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_plain_checkpoints_hold_the_pattern_itself(kind: str, tmp_path: Path) -> None:
    case = permuted_case(kind, tmp_path / "dense")
    model = written(case, tmp_path / "export", TransformersFolder())
    torch.testing.assert_close(case.logits(model), case.logits(), rtol=1e-4, atol=1e-5)
    takers = [layer for layer, s in case.job.storages.items() if s.permuted]
    assert len(takers) == 2
    for layer in takers:
        assert follows(read_weight(model, layer), 2, 4)
        assert not follows(read_weight(case.model, layer), 2, 4)


def test_an_order_that_nobody_can_follow_is_an_error(tmp_path: Path) -> None:
    case = permuted_case("llama", tmp_path / "dense")
    layer = next(la for la in case.job.storages if la.role == "o_proj")
    before = {n: p.clone() for n, p in case.model.named_parameters()}
    with pytest.raises(ExportError, match=r"of .*o_proj cannot be folded: .*heads"):
        fold(case.model, case.job.inventory, {layer: torch.arange(32)})
    assert all(torch.equal(p, before[n]) for n, p in case.model.named_parameters())
