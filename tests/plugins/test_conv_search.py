"""A ResNet trained on digits, searched, exported and verified by a fresh process."""

import json
from pathlib import Path

import pytest
import torch
from autoprune_plugins.conv_digits import train_resnet

from autoprune.config import RunConfig
from autoprune.deliver import export
from autoprune.run import find_space, search

SMALLER = {"embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1]}


def test_the_space_that_ships_reads_strictly() -> None:
    config = RunConfig.from_yaml(find_space("convnet"))
    assert config.task == "image-classification"
    assert config.text.source == "digits:test"
    assert find_space("convnet").read_text().startswith("# For ")


@pytest.mark.slow
def test_a_trained_resnet_is_searched_exported_and_verified(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    loss = train_resnet(folder, epochs=8, **SMALLER)
    assert loss < 1.0  # 2.3 before training
    config = RunConfig.from_yaml(
        find_space("convnet"),
        model=str(folder),
        text__fitness=40,
        text__choice=40,
        search__trials=4,
        search__finalists=1,
        objective__budgets={"size_bytes": "40%"},
    )
    result = search(config, tmp_path / "run")
    assert result.policy is not None
    winner, dense = result.finals["winner"]["report"], result.finals["dense"]
    assert winner["size_bytes"] <= 0.4 * dense["size_bytes"]
    assert dense["accuracy"] > 0.6
    assert winner["accuracy"] > dense["accuracy"] - 0.2
    assert set(result.trials["int8_accuracy"].notna()) == {True}
    reports = [export(tmp_path / "run", target=t) for t in ("packed", "transformers")]
    for (report,) in reports:
        assert report.verified is not None
        again = json.loads((report.folder / "preprocessor_config.json").read_text())
        assert again["image_mean"] == [0.5]


@pytest.mark.slow
def test_training_is_repeatable(tmp_path: Path) -> None:
    losses = [
        train_resnet(tmp_path / name, images=128, epochs=1, seed=3, **SMALLER)
        for name in ("one", "two")
    ]
    assert losses[0] == losses[1]
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")
    ]
    assert weights[0] == weights[1]
    before = torch.get_rng_state()
    train_resnet(tmp_path / "three", images=64, epochs=0, **SMALLER)
    assert torch.equal(torch.get_rng_state(), before)
