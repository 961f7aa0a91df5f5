"""Whole runs that train their finalists: real tiny models, real studies."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import space_of as plain_space
from tiny_runs import write_text

from autoprune.config import RunConfig
from autoprune.errors import ConfigError, PolicyError
from autoprune.evaluation.workbench import Workbench
from autoprune.reporting.observer import Observer
from autoprune.run import search
from autoprune.searching.ledger import Ledger
from autoprune.searching.reserve import Reserve
from autoprune.searching.rows import Trial

COURSES = [
    "one-shot + blockwise(tokens=[512, 2048])",
    "one-shot + distill(tokens=1024, learning_rate=[0.003, 0.9])",
]
SPACE = [
    {"actions": ["magnitude(sparsity=[0.4, 0.5, 0.6, 0.7])"]},
    {"sites": "embedding", "actions": ["dense"]},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"), documents=900)


def space_of(model: Path, text: str, **changes: Any) -> dict[str, Any]:
    """Give a small space with courses; ``changes`` are of its recovery."""
    data = plain_space(model, text)
    recovery = {"schedules": COURSES, "candidates": 1, **changes}
    return data | {
        "text": data["text"] | {"recovery": 64},
        "space": SPACE,
        "objective": {"budgets": {"sparsity": 0.55}},
        "search": {"trials": 4, "finalists": 2, "refine": "solve", "rivals": []},
        "recovery": recovery,
    }


def run(model: Path, text: str, folder: Path, **changes: Any) -> Any:
    config = RunConfig.from_dict(space_of(model, text, **changes))
    return search(config, folder)


def rows(folder: Path) -> list[Trial]:
    with Ledger.read(folder / "recovery") as ledger:
        return ledger.trials()


def told(trials: list[Trial]) -> list[tuple[Any, ...]]:
    """Give what does not depend on the time of day."""
    return [(t.policy.schedule, t.state, t.values, dict(t.params)) for t in trials]


@pytest.fixture(scope="module")
def done(
    tiny_checkpoint: Path, text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, run(tiny_checkpoint, text, folder)


def test_the_winner_is_trained_and_says_how(done: tuple[Path, Any]) -> None:
    folder, result = done
    finals = json.loads((folder / "finals.json").read_text())
    record = json.loads((folder / "policy.json").read_text())
    trained = finals["trained"]
    assert result.policy.schedule == record["schedule"] == trained[0]["schedule"]
    assert record["trial"] == trained[0]["trial"]
    best = min(one["choice"]["kl"] for one in finals["finalists"])
    assert trained[0]["choice"]["kl"] < best
    assert finals["winner"]["report"]["kl"] < best


def test_each_course_is_a_row_short_ones_included(done: tuple[Path, Any]) -> None:
    found = rows(done[0])
    assert len({t.policy.schedule for t in found}) == len(found) == 4
    for trial in found:
        tokens = int(trial.policy.schedule.rpartition("tokens=")[2].strip(")"))
        whole = 0 if trial.state in ("pruned", "diverged") else tokens
        assert trial.metrics["training_tokens"] == whole + -(-tokens // 4)
        assert set(trial.system_attrs) == {"short"}
    states = {t.policy.schedule: t.state for t in found}
    assert states["one-shot + distill(learning_rate=0.9, tokens=1024)"] != "complete"


def test_the_same_command_trains_nothing_again(
    done: tuple[Path, Any], tiny_checkpoint: Path, text: str
) -> None:
    folder, result = done
    before = told(rows(folder))
    again = run(tiny_checkpoint, text, folder)
    assert told(rows(folder)) == before
    assert again.policy == result.policy


class Killed(BaseException):
    """Ends a run as a kill does: nothing is written any more."""


def test_a_search_that_was_killed_ends_as_an_undisturbed_one(
    done: tuple[Path, Any],
    tiny_checkpoint: Path,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, count = tmp_path / "run", 0
    original = Ledger.begin

    def begin(self: Ledger, trial: Trial, *rest: Any) -> None:
        nonlocal count
        original(self, trial, *rest)
        count += trial.origin == "recovery"
        if count == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "begin", begin)
        with pytest.raises(Killed):
            run(tiny_checkpoint, text, folder)
    assert len(rows(folder)) == 2
    result = run(tiny_checkpoint, text, folder)
    assert told(rows(folder)) == told(rows(done[0]))
    assert rows(folder)[2].attempts == 2
    assert result.policy == done[1].policy


def test_training_may_cost(
    done: tuple[Path, Any], tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    run(tiny_checkpoint, text, tmp_path, price=1000.0, short=1.0, trials=3)
    found = rows(tmp_path)
    assert len(found) == 3
    for trial in found:
        assert not trial.system_attrs
        if trial.state == "complete":
            price = 1000.0 * trial.metrics["training_tokens"] / 1e6
            assert trial.values[0] == pytest.approx(trial.metrics["kl"] + price)


def test_no_course_is_begun_that_would_not_end_in_time(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    data = space_of(tiny_checkpoint, text)
    data["recovery"]["schedules"] = ["one-shot + distill(tokens=1000000000000)"]
    data["search"] |= {"budget": 600}
    notes: list[str] = []

    class Noting(Observer):
        def note(self, text: str) -> None:
            notes.append(text)

    config = RunConfig.from_dict(data)
    result = search(config, tmp_path, observer=Noting())
    assert rows(tmp_path) == []
    assert result.policy is not None and result.policy.schedule == "one-shot"
    kept = [note for note in notes if "240 for recovery" in note]
    assert kept, notes


def test_what_recovery_keeps_is_not_refined_away() -> None:
    reserve = Reserve(rank=1, solve=2, mix=3, report=4, export=5, recovery=100)
    assert (reserve.last, reserve.closing, reserve.total) == (9, 109, 120)


def test_bad_courses_are_refused_before_a_search(
    tiny_checkpoint: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a trial was measured")

    monkeypatch.setattr(Workbench, "measure", never)
    with pytest.raises(PolicyError, match="unknown recovery 'distil'. Did you mean"):
        run(tiny_checkpoint, text, tmp_path, schedules=["one-shot + distil(tokens=9)"])
    with pytest.raises(ConfigError, match="trains nothing. Add a recovery with tokens"):
        run(tiny_checkpoint, text, tmp_path, schedules=["iterative"])
    data = space_of(tiny_checkpoint, text)
    data["text"]["recovery"] = 0
    with pytest.raises(ConfigError, match="give text.recovery, such as 128; found 0"):
        RunConfig.from_dict(data)
