"""Pickles are read if they are asked for by name, and nothing in them is run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny

from autoprune.errors import ModelError
from autoprune.models.checkpoints import load_model, resolve


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A checkpoint whose weights are in a pickle alone."""
    folder = tmp_path / "model"
    model = tiny("llama")
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").write_text("{}")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_the_folder_is_refused_and_says_how(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"only in pytorch_model\.bin.*Name that file"):
        resolve(str(pickled), cache=tmp_path / "cache")


def test_the_file_is_converted_once(pickled: Path, tmp_path: Path) -> None:
    named = str(pickled / "pytorch_model.bin")
    found = resolve(named, cache=tmp_path / "cache")
    state = load_model(found).state_dict()
    expected = torch.load(named, weights_only=True)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert (found.folder / "tokenizer.json").exists()
    assert not list(found.folder.glob("*.bin"))
    before = (found.folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(named, cache=tmp_path / "cache") == found
    assert (found.folder / "model.safetensors").stat().st_mtime_ns == before


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_nothing_in_it_is_run(pickled: Path, tmp_path: Path) -> None:
    file = pickled / "pytorch_model.bin"
    torch.save({"weight": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(ModelError, match="holds more than tensors"):
        resolve(str(file), cache=tmp_path / "cache")
    assert not (tmp_path / "sprung").exists()


def test_what_does_not_fit_is_told(pickled: Path, tmp_path: Path) -> None:
    file, cache = pickled / "pytorch_model.bin", tmp_path / "cache"
    state = torch.load(file, weights_only=True)
    torch.save({k: v for k, v in state.items() if "up_proj" not in k}, file)
    with pytest.raises(ModelError, match=r"lacks 2 weights of LlamaForCausalLM, first"):
        resolve(str(file), cache=cache)
    file.write_bytes(b"PK nothing")
    with pytest.raises(ModelError, match="or is damaged"):
        resolve(str(file), cache=cache)
    config = json.loads((pickled / "config.json").read_text())
    (pickled / "config.json").write_text(json.dumps(config | {"model_type": "yolo3"}))
    torch.save(state, file)
    with pytest.raises(ModelError, match="yolo3"):
        resolve(str(file), cache=cache)
    (pickled / "config.json").unlink()
    with pytest.raises(ModelError, match=r"a folder without config\.json"):
        resolve(str(file), cache=cache)
