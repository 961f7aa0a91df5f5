"""Policies with schedules are exported by the command, verified, and opened again."""

import json
from pathlib import Path

import pytest
from tiny_trainings import write_lines
from typer.testing import CliRunner

from autoprune import apply, evaluate, load
from autoprune.cli import app
from autoprune.config import TextConfig
from autoprune.errors import PolicyError
from autoprune.policy import Policy

ACTIONS = {
    "embedding": "dense",
    **{
        f"blocks.{n}.{site}": "wanda(pattern=2:4)"
        for n in range(2)
        for site in ("qkv", "o", "gate_up", "down")
    },
}
COURSE = "one-shot + distill(batch=1, learning_rate=0.003, tokens=8192)"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lines(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(
    tiny_checkpoint: Path, text: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of an export that the command has made."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "policy.json").write_text(json.dumps({"actions": ACTIONS}))
    given = ["train", str(tiny_checkpoint), "--policy", str(folder / "policy.json")]
    given += ["--out", str(folder / "out"), "--text", text, "--windows", "9"]
    result = CliRunner().invoke(app, [*given, "--schedule", COURSE])
    assert result.exit_code == 0, result.output
    return folder / "out"


def test_the_export_says_how_it_was_trained(trained: Path) -> None:
    record = json.loads((trained / "policy.json").read_text())
    assert record["schedule"] == COURSE
    assert record["text"]["recovery"] == 9
    assert Policy.from_dict(record).schedule == COURSE


def test_what_is_loaded_is_what_was_trained(trained: Path) -> None:
    record = json.loads((trained / "policy.json").read_text())
    found = evaluate(str(trained))["export"]["perplexity"]
    told = record["figures"]["compressed"]["perplexity"]
    assert found == pytest.approx(told, rel=5e-3)  # it may compute in another type
    weight = load(trained).get_submodule("model.layers.0.mlp.down_proj").weight
    assert (weight.view(-1, 4) == 0).sum(1).tolist() == [2] * (weight.numel() // 4)


def test_a_trained_policy_is_measured_on_the_dense_model_again(
    trained: Path, tiny_checkpoint: Path, text: str
) -> None:
    asked = TextConfig(source=text, recovery=9)
    found = evaluate(str(tiny_checkpoint), policy=trained, text=asked)
    told = json.loads((trained / "policy.json").read_text())["figures"]["compressed"]
    assert found["policy"]["kl"] == pytest.approx(told["kl"], rel=1e-6)


def test_statistics_of_what_is_trained_cannot_be_reused(
    trained: Path, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    with pytest.raises(PolicyError, match="takes statistics of what it has trained"):
        apply(
            trained,
            model=str(tiny_checkpoint),
            out=tmp_path / "out",
            text=TextConfig(source=text, recovery=9),
            statistics="reuse",
        )


def test_what_is_no_schedule_is_told_by_the_command(
    trained: Path, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    given = ["train", str(tiny_checkpoint), "--policy", str(trained), "--text", text]
    given += ["--out", str(tmp_path / "out"), "--schedule"]
    result = CliRunner().invoke(app, [*given, "iteratve + lora(tokens=99)"])
    assert result.exit_code == 1
    assert "unknown schedule 'iteratve'. Did you mean 'iterative'" in result.output
