"""What a run folder holds is read back, or it is told why it cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest

from autoprune.config import RunConfig
from autoprune.errors import ConfigError, RunError
from autoprune.policy import Action, Policy
from autoprune.searching.ledger import Ledger
from autoprune.searching.rows import Trial, utc_now
from autoprune.searching.runs import (
    check_unchanged,
    name_of,
    parts_in,
    read_config,
    read_trial,
    read_trials,
    read_winner,
)

MADE_WITH = {
    "model": "0123456789abcdef",
    "text": {"report": "aaaa", "fitness": "bbbb"},
    "compute_dtype": "bfloat16",
    "bank": "cccc",
    "methods": {"rtn": "1"},
}
POLICY = Policy({"blocks.0.o": Action.parse("rtn(bits=4)")})


def trial(number: int) -> Trial:
    now = utc_now()
    return Trial(
        number=number,
        state="complete",
        origin="random",
        policy=POLICY,
        params={"blocks.0.o": "rtn(bits=4)"},
        seed=number,
        started=now,
        finished=now,
        values=(1.0,),
        metrics={"kl": 1.0},
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    with Ledger.open(tmp_path / "run", MADE_WITH) as ledger:
        for number in range(3):
            ledger.add(trial(number))
    return tmp_path / "run"


def test_trials_are_read_in_their_order(run_dir: Path) -> None:
    assert [one.number for one in read_trials(run_dir)] == [0, 1, 2]
    for name in (2, "2"):
        found, reference = read_trial(run_dir, name)
        assert found.seed == 2
        assert reference is None


def test_a_trial_that_is_not_there(run_dir: Path) -> None:
    with pytest.raises(RunError, match="has no trial 3; it has 3, counted from 0"):
        read_trial(run_dir, 3)


def test_a_trial_of_a_further_round_has_its_reference(run_dir: Path) -> None:
    with Ledger.open(run_dir / "round-2", MADE_WITH) as ledger:
        ledger.add(trial(0))
    (run_dir / "round-2/reference.json").write_text(json.dumps(POLICY.to_dict()))
    assert parts_in(run_dir) == ["round-2"]
    found, reference = read_trial(run_dir, name_of("round-2", 0))
    assert found.number == 0
    assert reference == POLICY
    with pytest.raises(RunError, match="round-2 has no trial 1; it has 1"):
        read_trial(run_dir, "round-2/1")
    (run_dir / "round-2/reference.json").write_text("[]")
    with pytest.raises(RunError, match=r"cannot read .*reference\.json: .*same search"):
        read_trial(run_dir, "round-2/0")


@pytest.mark.parametrize("name", [-1, "last", "round-3/0", "../run/0", "round-2/", ""])
def test_a_name_that_no_trial_can_have(name: int | str, run_dir: Path) -> None:
    with Ledger.open(run_dir / "round-2", MADE_WITH):
        pass
    message = "is no name of a trial; a number such as 13 is, and round-2/13 in its"
    with pytest.raises(RunError, match=message):
        read_trial(run_dir, name)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder: it has no config.yaml"):
        read_config(tmp_path)
    with pytest.raises(RunError, match="is no run folder: it has no ledger.sqlite"):
        read_trials(tmp_path)


def test_a_configuration_is_read(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(
        "space: [{actions: [dense]}]\nsearch: {trials: 7}\n"
    )
    config = read_config(run_dir)
    assert isinstance(config, RunConfig)
    assert config.search.trials == 7
    (run_dir / "config.yaml").write_text("space: [{actions: [dense]}]\nserch: 7\n")
    with pytest.raises(ConfigError, match="unknown key 'serch'. Did you mean 'search'"):
        read_config(run_dir)


@pytest.mark.parametrize("reference", [None, POLICY.to_dict()], ids=["dense", "own"])
def test_a_winner_is_read(reference: dict[str, Any] | None, run_dir: Path) -> None:
    record = {**POLICY.to_dict(), "trial": 1, "reference": reference}
    (run_dir / "policy.json").write_text(json.dumps(record))
    assert read_winner(run_dir) == record


def test_a_search_that_has_not_ended(run_dir: Path) -> None:
    with pytest.raises(RunError, match="has no winner yet: policy.json is written whe"):
        read_winner(run_dir)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "act', "Unterminated string"),
        ("7", "not a policy"),
        ('{"actions": {"blocks.0.o": "rtn("}}', r"cannot read 'rtn\('"),
        ('{"actions": {}, "reference": {"action": {}}}', "not a policy"),
    ],
    ids=["cut", "number", "action", "reference"],
)
def test_a_damaged_winner(content: str, message: str, run_dir: Path) -> None:
    (run_dir / "policy.json").write_text(content)
    with pytest.raises(RunError, match=rf"winner .*policy\.json: .*{message}.*anew"):
        read_winner(run_dir)


def test_what_a_run_was_made_with_is_compared(run_dir: Path) -> None:
    check_unchanged(run_dir, MADE_WITH)
    changed = {**MADE_WITH, "model": "fedc", "methods": {"rtn": "2"}}
    message = (
        "run was made with has changed:\n"
        "  methods.rtn: '1' then, '2' now\n"
        "  model: '0123456789abcdef' then, 'fedc' now\n"
    )
    with pytest.raises(RunError, match=message):
        check_unchanged(run_dir, changed)


def test_another_machine_may_compute_in_another_type(run_dir: Path) -> None:
    check_unchanged(run_dir, {**MADE_WITH, "compute_dtype": "float32", "bank": "dddd"})
