from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoprune.errors import PluginError, RunError
from autoprune.policy import Policy
from autoprune.reporting.status import RunStatus
from autoprune.searching.ledger import Ledger
from autoprune.searching.rows import Trial

CONFIG: dict[str, Any] = {
    "space": [{"actions": ["dense"]}],
    "objective": {"metric": "perplexity"},
    "search": {"trials": 9},
}

Make = Callable[..., Path]


def trial(number: int, perplexity: float, size: float, **more: Any) -> Trial:
    action = f"rtn(bits={2 + number})"
    return Trial(
        **{
            "number": number,
            "state": "complete",
            "origin": "random",
            "policy": Policy.from_dict({"actions": {"blocks.0.o": action}}),
            "params": {},
            "seed": 0,
            "started": "2026-01-01T00:00:00.000+00:00",
            "finished": "2026-01-01T00:00:01.000+00:00",
            "values": (perplexity,),
            "metrics": {"perplexity": perplexity, "kl": perplexity, "size_bytes": size},
            "timings": {"propose_s": 0.5, "evaluate_s": 1.5},
        }
        | more
    )


TRIALS = [
    trial(0, 30.0, 100.0),
    trial(1, 20.0, 200.0),
    trial(2, 25.0, 300.0),  # beaten by 1 in both
    trial(3, 10.0, 50.0, constraints={"latency_ms": 0.1}),  # over a limit
    trial(4, 99.0, 10.0, state="failed", values=(), metrics={}, error="no"),
]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a run folder."""

    def run(config: dict[str, Any] = CONFIG, trials: list[Trial] = TRIALS) -> Path:
        with Ledger.open(tmp_path, {}) as ledger:
            for one in trials:
                ledger.add(one)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return tmp_path

    return run


def numbers(trials: Any) -> list[int]:
    return [one.number for one in trials]


def test_best_trials_keep_every_limit(make: Make) -> None:
    status = RunStatus.read(make())
    assert status.goals == (("perplexity", "minimize"),)
    assert numbers(status.best) == [1, 2, 0]
    assert status.states() == {"complete": 4, "failed": 1}


def test_the_front_of_one_goal_is_of_size_and_divergence(make: Make) -> None:
    assert numbers(RunStatus.read(make()).front) == [0, 1]


def test_the_front_of_several_goals_is_theirs(make: Make) -> None:
    config = CONFIG | {"objective": {"pareto": ["perplexity", "size_bytes"]}}
    trials = [
        trial(0, 30.0, 100.0, values=(30.0, 100.0)),
        trial(1, 31.0, 100.0, values=(31.0, 100.0)),
        trial(2, 20.0, 200.0, values=(20.0, 200.0)),
    ]
    status = RunStatus.read(make(config, trials))
    assert status.best == []
    assert numbers(status.front) == [2, 0]


def test_a_ratio_to_maximise_is_best_when_large(make: Make) -> None:
    config = CONFIG | {"objective": {"metric": "compression_ratio"}}
    status = RunStatus.read(make(config, TRIALS[:3]))
    assert status.goals == (("compression_ratio", "maximize"),)
    assert numbers(status.best) == [0, 2, 1]


def test_time_is_told_by_the_mean_trial(make: Make) -> None:
    status = RunStatus.read(make())
    assert status.mean_trial_s == pytest.approx(2.0)
    assert status.left_s == pytest.approx(8.0)


def test_a_run_is_read_while_it_goes_on(make: Make) -> None:
    folder = make(trials=TRIALS[:1])
    with Ledger.open(folder, {}) as ledger:
        ledger.add(TRIALS[1])
        assert len(RunStatus.read(folder).trials) == 2


def test_a_run_without_trials_has_a_status(make: Make) -> None:
    status = RunStatus.read(make(trials=[]))
    assert (status.mean_trial_s, status.left_s, status.best) == (None, None, [])
    assert status.to_dict()["last_finished"] is None


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder"):
        RunStatus.read(tmp_path)


def test_damaged_finals_are_told(make: Make) -> None:
    folder = make()
    (folder / "finals.json").write_text("{")
    with pytest.raises(RunError, match="finals.json.*its trials are kept"):
        RunStatus.read(folder)


def test_a_plugin_that_is_gone_is_told(make: Make) -> None:
    with pytest.raises(PluginError, match="no_such_module"):
        RunStatus.read(make(CONFIG | {"plugins": ["no_such_module"]}))
