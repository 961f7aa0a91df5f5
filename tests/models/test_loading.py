"""Loading is silent and strict."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining
from transformers.utils import logging as transformers_logging

from autoprune.errors import ModelError
from autoprune.models.loading import first_line, load_strictly, quiet


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Set weights by name, with ``__`` for the dots; None takes one away."""
    weights = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        weights.pop(name.replace("__", "."), None)
        if value is not None:
            weights[name.replace("__", ".")] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, auto_class: str = "AutoModelForCausalLM") -> torch.nn.Module:
    return load_strictly(folder, auto_class, dtype=torch.float32)


def test_model_is_ready_for_reading(folder: Path) -> None:
    model = load(folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_settings_of_the_process_are_put_back() -> None:
    level = transformers_logging.get_verbosity()
    for bars in (True, False):
        switch = "enable" if bars else "disable"
        getattr(transformers_logging, f"{switch}_progress_bar")()
        with pytest.raises(ZeroDivisionError), quiet():
            assert not transformers_logging.is_progress_bar_enabled()
            _ = 1 / 0
        assert transformers_logging.is_progress_bar_enabled() is bars
    transformers_logging.enable_progress_bar()
    assert transformers_logging.get_verbosity() == level


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(folder)
    assert capfd.readouterr() == ("", "")


def test_missing_weight_is_never_drawn_at_random(folder: Path) -> None:
    change_weights(folder, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ModelError, match=r"1 are missing.*layers\.1\.mlp\.up_proj"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["model__layers__7__mlp__up_proj__weight", "model__norm__bias"],
    ids=["a block too many", "a bias of a module in use"],
)
def test_weight_without_a_place_is_refused(folder: Path, name: str) -> None:
    change_weights(folder, **{name: torch.zeros(3)})
    with pytest.raises(ModelError, match=f"no place for 1.*{name.replace('__', '.')}"):
        load(folder)


def test_wrong_shape_is_refused(folder: Path) -> None:
    change_weights(folder, model__norm__weight=torch.ones(5))
    with pytest.raises(
        ModelError, match=r"'model.norm.weight' has shape \[5\].*\[64\]"
    ):
        load(folder)


def test_weights_of_another_head_are_left_out(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=50,
    )
    BertForPreTraining(config).save_pretrained(tmp_path)
    model = load(tmp_path, "AutoModelForMaskedLM")
    stored = load_file(tmp_path / "model.safetensors")
    assert "cls.seq_relationship.weight" in stored
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(model.get_parameter(name), stored[name])


def test_unknown_class_names_near_misses(folder: Path) -> None:
    with pytest.raises(
        ModelError, match="'AutoModelForCausalML'.*AutoModelForCausalLM"
    ):
        load(folder, "AutoModelForCausalML")


@pytest.mark.parametrize(
    ("auto_class", "model_type", "found"),
    [
        ("AutoModelForMaskedLM", "llama", "Unrecognized configuration class"),
        ("AutoModelForCausalLM", "lama", "lama"),
    ],
    ids=["class", "architecture"],
)
def test_what_transformers_cannot_read(
    folder: Path, auto_class: str, model_type: str, found: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"cannot load .* as {auto_class}.*{found}"):
        load(folder, auto_class)


def test_first_line_of_an_error_without_a_message() -> None:
    assert first_line(KeyError()) == "KeyError: "
    assert first_line(ValueError("one.\ntwo")) == "ValueError: one"
