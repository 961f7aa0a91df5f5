"""Searches that are killed lose nothing: the script that says so, for some kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "results" / "scale" / "kills.py"


def kill(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.slow
@pytest.mark.ci
def test_twenty_kills_lose_nothing() -> None:
    found = kill("--kills", "20", "--seed", "7")
    print(found)
    assert sum(found["kills"].values()) >= 20
    assert len(found["kills"]) >= 5  # of its stages
    assert found["faults"] == [] and found["searches"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["nsga2", "evolution"])
def test_other_strategies_end_as_if_undisturbed(sampler: str) -> None:
    found = kill("--kills", "10", "--seed", "8", "--sampler", sampler)
    assert found["faults"] == []


@pytest.mark.slow
def test_kills_of_workers_and_drivers_lose_nothing() -> None:
    found = kill("--kills", "8", "--seed", "9", "--workers", "2")
    assert sum(found["kills"].values()) >= 8
    assert found["faults"] == []
