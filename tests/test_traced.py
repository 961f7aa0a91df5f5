"""The whole way on models that nobody has described."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_own import own_model
from tiny_runs import config_of, write_text
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

import autoprune
from autoprune.exporting.exporter import EXACT
from autoprune.models.layers import Inventory, inventory
from autoprune.policy import Site

pytestmark = [pytest.mark.slow, pytest.mark.ci]

HALVES = [
    {"sites": "blocks.*.mlp", "actions": ["channels(keep=0.5)"]},
    {"sites": "blocks.*.attention", "actions": ["heads(keep=0.5)"]},
    {"sites": "embedding", "actions": ["dense"]},
]

OWN_NOTES = [
    "channels stay as zeros of full size: ValueError: OwnConfig has no setting for the "
    "channels of an MLP, such as intermediate_size",
    "heads stay as zeros of full size: AttributeError: 'OwnConfig' object has no "
    "attribute 'num_attention_heads'",
]

CUT_NOTES = [
    "cut channels: 24 of 48 stay in every block",
    "cut heads: 1 of 2 stay in every block",
]


def starcoder() -> Starcoder2ForCausalLM:
    config = Starcoder2Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Starcoder2ForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "notes"),
    [(lambda: own_model(words=256), OWN_NOTES), (starcoder, CUT_NOTES)],
    ids=["own", "starcoder2"],
)
def test_channels_and_heads_go(
    make: Any,
    notes: list[str],
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    dense = make()
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    config = config_of(
        tmp_path / "dense",
        write_text(tmp_path),
        plugins=["tiny_own"],
        space=HALVES,
        objective={"budgets": {}},
        search={"trials": 1, "finalists": 1},
    )
    result = autoprune.search(config, tmp_path / "run")
    found = inventory(dense, [])
    removed = [site for site in found.groups if site.name in result.policy]
    assert len(removed) == 4
    (packed,) = autoprune.export(tmp_path / "run", out=tmp_path / "packed")
    model = autoprune.load(packed.folder, plugins=["tiny_own"])
    assert lost(model, found, removed) == {"channels": 24, "heads": 1}
    (plain,) = autoprune.export(
        tmp_path / "run", out=tmp_path / "plain", target="transformers"
    )
    assert list(plain.notes) == notes
    assert plain.verified.perplexity == pytest.approx(
        packed.verified.perplexity, rel=EXACT.perplexity
    )


def lost(model: nn.Module, found: Inventory, sites: list[Site]) -> dict[str, int]:
    """Count the units that are zeros in all layers of a site, equally many in each."""
    counts = {}
    for site in sites:
        empty = []
        for layer in site.layers:
            cut = layer.cut
            assert cut is not None
            weight = model.get_submodule(layer.name).weight
            lines = weight if cut.axis == "rows" else weight.t()
            empty.append((lines.reshape(cut.units, -1) == 0).all(1))
        assert all(torch.equal(one, empty[0]) for one in empty)
        count = int(empty[0].sum())
        assert counts.setdefault(site.kind, count) == count
    return counts
