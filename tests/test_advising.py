"""Advice on formats, from a configuration alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from autoprune.advising import NARROW, UNSTRUCTURED, Advice, advise
from autoprune.errors import ConfigError, ModelError, ProfileError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of an 8B model, and no weights at all."""
    path = tmp_path_factory.mktemp("llama-8b")
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def h100(folder: Path) -> Advice:
    return advise(str(folder), "h100")


def of(advice: Advice, **wanted: Any) -> list[Any]:
    return [
        gain
        for gain in advice.gains
        if all(getattr(gain, name) == value for name, value in wanted.items())
    ]


def test_every_kind_of_layer_is_told_once_a_phase(h100: Advice) -> None:
    decode = of(h100, workload="decode", phase="decode", change="fp8-row")
    assert {gain.where: gain.count for gain in decode} == {
        "q_proj 4096 x 4096": 32,
        "k_proj 1024 x 4096": 32,
        "v_proj 1024 x 4096": 32,
        "o_proj 4096 x 4096": 32,
        "gate_proj 14336 x 4096": 32,
        "up_proj 14336 x 4096": 32,
        "down_proj 4096 x 14336": 32,
    }


def test_nothing_is_said_to_pay_that_a_data_sheet_cannot_tell(h100: Advice) -> None:
    for gain in h100.gains:
        assert gain.tier == "roofline_datasheet"
        assert (gain.verdict == "pays") == (
            gain.high < 1 and gain.verdict != "no kernel"
        )
    assert "not measured on a GPU yet" in h100.basis


def test_what_has_no_kernel_is_said_to_have_none(h100: Advice, folder: Path) -> None:
    assert {g.verdict for g in of(h100, change="2:4+int4-g64")} == {"no kernel"}
    a100 = advise(str(folder), "a100", workloads=["decode"])
    assert {g.verdict for g in of(a100, change="fp8-row")} == {"no kernel"}


def test_zeros_without_a_pattern_gain_exactly_nothing(h100: Advice) -> None:
    for gain in of(h100, change=UNSTRUCTURED):
        assert (gain.ratio, gain.low, gain.high) == (1.0, 1.0, 1.0)
        assert gain.verdict == "does not pay"


def test_a_narrower_mlp_pays_where_the_mlp_is_most_of_the_model(h100: Advice) -> None:
    for gain in of(h100, change=NARROW):
        # MLPs are 81 % of the weights in blocks, and 71 % of all.
        assert 0.55 < gain.ratio < 0.75
        assert gain.verdict == "pays"


def test_it_is_plain_data(h100: Advice) -> None:
    assert json.loads(json.dumps(h100.to_dict()))["device"] == "h100"


def test_what_is_unknown_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="Did you mean 'h100'"):
        advise(str(folder), "h10")
    with pytest.raises(ConfigError, match="Did you mean 'decode'"):
        advise(str(folder), "h100", workloads=["decod"])
    with pytest.raises(ModelError, match="cannot make out the model"):
        advise(str(tmp_path), "h100")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot make out the model"):
        advise(str(tmp_path), "h100")
