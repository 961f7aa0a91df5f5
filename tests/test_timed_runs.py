"""Runs in which time counts: a budget, a front, a reward, and other budgets after."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import config_of, write_text

from autoprune.config import RunConfig
from autoprune.errors import ConfigError, ProfileError
from autoprune.reporting.observer import Observer
from autoprune.reporting.status import RunStatus
from autoprune.run import SearchResult, search
from autoprune.solving import solve

LONG = {"long": {"batch": 64, "prompt": 4096, "output": 1}}
"""So many tokens that even tiny products take longer than the start of a kernel."""

NAME = "latency_long_ms"
LATENCY = {"device": "h100", "workloads": [LONG]}
SPACE = [
    {"sites": "blocks.*.mlp", "actions": ["channels(keep=[0.25, 0.5])", "dense"]},
    {"sites": "blocks.*.attention", "actions": ["heads(keep=0.5)", "dense"]},
]


class Listener(Observer):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def timed(model: Path, text: str, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "space": SPACE,
        "latency": LATENCY,
        "objective": {"budgets": {NAME: "94%"}},
        "search": {"trials": 8, "finalists": 2, "refine": "none"},
    }
    return config_of(model, text, **settings | changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def ended(
    tiny_checkpoint: Path, text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SearchResult, Listener]:
    """A search under a budget of time that has ended; nobody changes its folder."""
    listener, folder = Listener(), tmp_path_factory.mktemp("timed") / "run"
    found = search(timed(tiny_checkpoint, text), folder, observer=listener)
    return found, listener


def test_a_budget_of_time_is_kept(ended: tuple[SearchResult, Listener]) -> None:
    found, _ = ended
    dense = found.finals["dense"][NAME]
    good = found.trials[found.trials.state == "complete"]
    assert len(good) > 2
    assert (good[NAME] <= 0.94 * dense * (1 + 1e-9)).all()
    assert 0 < found.finals["winner"]["report"][NAME] <= 0.94 * dense


def test_the_end_tells_what_is_predicted_and_how_surely(
    ended: tuple[SearchResult, Listener],
) -> None:
    found, listener = ended
    told = found.finals["winner"]["latency"]["long"]
    low, high = told["interval_ms"]
    assert low < told["ms"] < high
    # What the search was credited with is no less than what is predicted.
    assert told["ms"] <= found.finals["winner"]["report"][NAME]
    assert told["worst_tier"] == "roofline_datasheet"
    assert sum(told["parts_ms"].values()) == pytest.approx(told["ms"])
    ratio, _, slow = told["over_dense"]
    assert ratio < slow < 1
    assert any("not measured on a GPU yet" in note for note in listener.notes)
    assert any("autoprune profile" in note for note in listener.notes)
    assert any("are removed as cut out" in note for note in listener.notes)


def test_a_run_is_solved_for_another_time(
    ended: tuple[SearchResult, Listener], tmp_path: Path
) -> None:
    found, _ = ended
    solved = solve(found.run_dir, [f"{NAME}=90%"], out=tmp_path / "policy.json")
    assert solved.metrics[NAME] <= 0.9 * found.finals["dense"][NAME]
    assert json.loads((tmp_path / "policy.json").read_text())["solved"]


def test_a_time_that_no_policy_reaches_is_refused(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = timed(tiny_checkpoint, text, objective={"budgets": {NAME: "1%"}})
    with pytest.raises(ConfigError, match=f"no policy .* {NAME} <="):
        search(config, tmp_path / "run")


def test_time_is_an_axis_of_the_front(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = timed(tiny_checkpoint, text, objective={"pareto": ["kl", NAME]})
    found = search(config, tmp_path / "run")
    good = found.trials[found.trials.state == "complete"]
    assert good[NAME].nunique() > 1
    status = RunStatus.read(found.run_dir)
    assert status.goals == (("kl", "minimize"), (NAME, "minimize"))


def test_time_weighs_in_a_reward_as_size_does(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = timed(tiny_checkpoint, text, objective={"reward": "logs"})
    found = search(config, tmp_path / "run")
    import numpy as np

    dense, rows = found.finals["dense"], found.trials
    good = rows[rows.state == "complete"]
    # Dense figures of the fitness split are those of the dense trial.
    plain = good[np.isclose(good[NAME], dense[NAME]) & (good.kl.abs() < 1e-6)].iloc[0]
    terms = (
        np.log(good.perplexity / plain.perplexity)
        + 0.2 * np.log(good.size_bytes / plain.size_bytes)
        + 0.2 * np.log(good[NAME] / plain[NAME])
    )
    assert np.allclose(good.reward, -terms, atol=1e-6)


@pytest.mark.parametrize(
    ("latency", "error", "message"),
    [
        ({"device": "h101"}, ProfileError, "h101.*Did you mean 'h100'"),
        ({"device": "h100", "workloads": ["decod"]}, ConfigError, "'decode'"),
        (
            {"device": "h100", "workloads": ["decode", {"decode": LONG["long"]}]},
            ConfigError,
            "two workloads make the metric 'latency_decode_ms'",
        ),
        (
            {"device": "h100", "workloads": [{"x": {"batch": 1, "prompt": 2}}]},
            ConfigError,
            "'x': output is missing",
        ),
        (
            {"device": "h100", "workloads": [{"x": LONG["long"] | {"batch": 0}}]},
            ConfigError,
            "batch is a whole number of at least 1, found 0",
        ),
        (
            {"device": "h100", "workloads": [{"x": LONG["long"] | {"dtype": "int9"}}]},
            ConfigError,
            "dtype 'int9'",
        ),
        (
            {"device": "h100", "workloads": [{"x": LONG["long"] | {"promt": 1}}]},
            ConfigError,
            "key 'promt'.*prompt",
        ),
    ],
)
def test_a_wrong_device_or_workload_is_told(
    tiny_checkpoint: Path,
    text: str,
    tmp_path: Path,
    latency: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    config = timed(tiny_checkpoint, text, latency=latency)
    with pytest.raises(error, match=message):
        search(config, tmp_path / "run")
