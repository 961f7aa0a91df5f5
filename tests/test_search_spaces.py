"""Each space that ships loads, fits a model, and runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import write_text
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from autoprune.config import RunConfig
from autoprune.run import find_space, search

FOLDER = Path(__file__).parents[1] / "search_spaces"
OF_IMAGES = {"convnet"}
"""Spaces of another kind of model: tests/plugins/test_conv_search.py runs them."""
SPACES = sorted(p for p in FOLDER.glob("*.yaml") if p.stem not in OF_IMAGES)
TIME = "latency_prefill_ms"


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A checkpoint whose widths the groups of the spaces divide."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
        dtype=torch.bfloat16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_there_is_one_a_question() -> None:
    names = [path.stem for path in SPACES]
    assert names == [
        "bits",
        "joint",
        "patterns",
        "quick",
        "recover",
        "sparsity",
        "structured",
    ]
    for path in SPACES:
        assert find_space(path.stem).samefile(path)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_space_reads_strictly_and_says_what_it_is_for(path: Path) -> None:
    config = RunConfig.from_yaml(path)
    assert config.model == "demo"
    assert config.text.source == "builtin"
    assert config.search.trials
    assert path.read_text().startswith("# For ")


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_space_runs_two_trials(path: Path, model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model": str(model),
        "text__source": write_text(tmp_path),
        "text__window": 32,
        **{f"text__{n}": 2 for n in ("statistics", "fitness", "choice", "report")},
        "search__trials": 2,
        "search__finalists": 1,
    }
    data = yaml.safe_load(path.read_text())
    if courses := data.get("recovery", {}).get("schedules"):
        short = [re.sub(r"tokens=(\[.*?\]|\d+)", "tokens=256", one) for one in courses]
        changes |= {"recovery__schedules": short, "recovery__trials": 1}
        changes |= {"recovery__short": 1.0, "text__recovery": 8}
    given = data["objective"]["budgets"]
    if TIME in given:  # a tiny model hardly takes longer than the starts of its kernels
        given[TIME] = changes[f"objective__budgets__{TIME}"] = "95%"
    config = RunConfig.from_yaml(path, **changes)
    result = search(config, tmp_path / "run")
    assert result.ended == "trials"
    # Two in each round, of which some are given up on the first rung.
    assert len(result.trials) == 2 * config.search.rounds
    assert set(result.trials["state"]) <= {"complete", "pruned"}
    assert result.policy is not None
    report = result.finals["winner"]["report"]
    if "sparsity" in given:
        assert report["sparsity"] >= given["sparsity"]
    elif "bits_per_weight" in given:
        assert report["bits_per_weight"] <= given["bits_per_weight"]
    else:
        ((name, limit),) = given.items()
        share = float(limit.rstrip("%")) / 100
        assert report[name] <= share * result.finals["dense"][name]
