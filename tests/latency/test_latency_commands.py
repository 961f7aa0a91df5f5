"""The command that records, on machines that lack what it does not need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoprune.cli import app
from autoprune.latency.profiles import Profile

# The two rooms that use pydantic stand for it here: a new typer itself needs it.
BARE = """
import sys

for name in ("autoprune.config", "autoprune.limits"):
    sys.modules[name] = None
for name in ("optuna", "ray", "scipy", "platformdirs", "pandas"):
    sys.modules[name] = None
from autoprune.cli import app

app()
"""


def test_the_plan_needs_no_optuna_ray_or_pydantic() -> None:
    command = ["profile", "--device", "cuda", "--plan", "--json"]
    found = subprocess.run(
        [sys.executable, "-c", BARE, *command], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    lines = json.loads(found.stdout)
    names = [line["what"] for line in lines]
    assert names.index("torch.mm.bf16") < names.index("cslt.24.bf16")
    assert names[-1] == "whole models"
    assert 60 < sum(line["seconds"] for line in lines) < 600


def test_the_module_runs_as_the_command_does() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "autoprune", "profile", "--device", "cpu", "--plan"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert "cpu.linear.fp32:" in found.stdout
    assert "the most important first" in found.stdout


def test_a_recording_by_the_command(tmp_path: Path) -> None:
    about = ["--device", "cpu", "--out", str(tmp_path), "--name", "mine", "--probe"]
    runner = CliRunner()
    found = runner.invoke(
        app, ["profile", *about, "--minutes", "0.02", "--json"], catch_exceptions=False
    )
    assert found.exit_code == 0
    data = json.loads(found.stdout)
    assert data["profile"] == str(tmp_path / "mine") and not data["complete"]
    assert Profile.read(tmp_path / "mine").points
    begun = runner.invoke(app, ["profile", *about, "--minutes", "0.02"])
    assert begun.exit_code == 1
    resumed = runner.invoke(app, ["profile", *about, "--minutes", "0.02", "--resume"])
    assert resumed.exit_code == 0
    assert "mine__2" in resumed.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--device", "tpu"], "found 'tpu'"), (["--part", "some"], "found 'some'")],
)
def test_what_makes_no_sense_is_refused(given: list[str], said: str) -> None:
    found = CliRunner().invoke(app, ["profile", "--plan", *given])
    assert found.exit_code == 1
    assert said in found.stderr
