"""Mirrors in real storages of Optuna, which go away and come back."""

import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from autoprune.errors import RunError
from autoprune.policy import Policy
from autoprune.searching import mirror as mirrors
from autoprune.searching.ledger import Ledger
from autoprune.searching.mirror import Mirror
from autoprune.searching.mirrored import NUMBER, shown, storage_of
from autoprune.searching.objective import Objective
from autoprune.searching.rows import Trial

TEXTS = ("dense", "wanda(sparsity=0.5)")
SITES = ("blocks.0.up", "head")
SPACE = {site: CategoricalDistribution(TEXTS) for site in SITES}
OBJECTIVE = Objective((("kl", "minimize"), ("speedup", "maximize")))


def make_trial(number: int, **changes) -> Trial:
    params = {SITES[0]: TEXTS[number % 2], SITES[1]: TEXTS[0]}
    made = Trial(
        number=number,
        state="complete",
        origin="random",
        policy=Policy.from_dict({"actions": params}),
        params=params,
        seed=2**32 - 1,
        started="2026-01-01T00:00:00.500+00:00",
        finished="2026-01-01T00:00:03.500+00:00",
        values=(0.5 + number, 2.0),
        metrics={"kl": 0.5, "speedup": 2.0},
        constraints={"latency_ms": -0.1, "quality": 0.2},
        timings={"evaluate_s": 1.0},
    )
    return replace(made, **changes)


@pytest.fixture(autouse=True)
def hurried(monkeypatch) -> None:
    """Tests need not be polite to a run, nor patient with a storage."""
    monkeypatch.setattr(mirrors, "MOST_SHARE", 1.0)
    monkeypatch.setattr(mirrors, "FIRST_PAUSE_S", 0.02)
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(params=["rdb", "journal"])
def place(request, tmp_path) -> str:
    path = tmp_path / "mirror"
    return f"sqlite:///{path}.db" if request.param == "rdb" else f"journal:{path}.log"


def mirror_of(folder: Path, place: str, name: str = "run") -> Mirror:
    return Mirror(place, name, objective=OBJECTIVE, distributions=SPACE, folder=folder)


def study_in(place: str, name: str = "run") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=storage_of(place)())


def numbers_in(place: str, name: str = "run") -> list[int]:
    return [trial.user_attrs[NUMBER] for trial in study_in(place, name).get_trials()]


def shown_now(place: str) -> list[int]:
    try:
        return numbers_in(place)
    except Exception:  # not made yet, or just deleted
        return []


def shows(place: str, numbers: Iterable[int]) -> bool:
    return shown_now(place) == list(numbers)


def soon(met) -> None:
    """Wait until something is so."""
    until = time.monotonic() + 30
    while not met():
        assert time.monotonic() < until
        time.sleep(0.02)


def ledger_in(folder: Path, trials: int = 0) -> Ledger:
    ledger = Ledger.open(folder, {"space": "ab12"})
    for number in range(trials):
        ledger.add(make_trial(number))
    return ledger


def test_rows_are_shown_as_dashboards_read_them(tmp_path, place):
    rows = [
        make_trial(0, attempts=2),
        make_trial(1, state="diverged", metrics={"kl": math.inf, "speedup": 2.0}),
        make_trial(
            2, state="failed", values=(), metrics={}, error="no", constraints={}
        ),
        make_trial(3, state="pruned"),
    ]
    with ledger_in(tmp_path / "run") as ledger:
        for row in rows:
            ledger.add(row)
        ledger.begin(make_trial(4, state="running", finished=""))
        mirror_of(tmp_path / "run", place).start().close()
    study = study_in(place)
    assert [direction.name for direction in study.directions] == [
        "MINIMIZE",
        "MAXIMIZE",
    ]
    assert study.metric_names == ["kl", "speedup"]
    seen = study.get_trials()
    assert [trial.state for trial in seen] == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.PRUNED,
    ]
    first, diverged, failed, _ = seen
    assert first.values == [0.5, 2.0]
    assert first.params == make_trial(0).params
    assert first.distributions == SPACE
    limits = first.constraints
    assert (limits["latency_ms"], limits["quality"]) == (-0.1, 0.2)
    assert first.system_attrs["constraints"] == [-0.1, 0.2]  # optuna-dashboard 0.21
    about = {"kl": 0.5, "origin": "random", "attempts": 2, "time.evaluate_s": 1.0}
    assert about.items() <= first.user_attrs.items()
    assert first.duration.total_seconds() == 3
    begin = datetime(2026, 1, 1, 0, 0, 0, 500_000, UTC)
    assert first.datetime_start == begin.astimezone().replace(tzinfo=None)
    assert diverged.user_attrs["kl"] == "inf"
    assert diverged.user_attrs["state"] == "diverged"
    assert failed.user_attrs["error"] == "no"
    assert [trial.number for trial in study.best_trials] == []  # `quality` is broken


def test_rows_appear_while_the_run_goes_on(tmp_path, place):
    with ledger_in(tmp_path / "run", 1) as ledger:
        with mirror_of(tmp_path / "run", place) as mirror:
            for number in range(1, 4):
                ledger.add(make_trial(number))
                mirror.update()
                soon(partial(shows, place, range(number + 1)))


def test_resumed_run_doubles_nothing(tmp_path, place):
    for last in (3, 3, 30):
        with ledger_in(tmp_path / "run") as ledger:
            for number in range(len(ledger.trials()), last):
                ledger.add(make_trial(number))
            mirror_of(tmp_path / "run", place).start().close()
    assert numbers_in(place) == list(range(30))


def test_rows_that_finish_out_of_order_are_all_shown(tmp_path, place):
    with ledger_in(tmp_path / "run") as ledger:
        ledger.begin(make_trial(0, state="running", finished=""))
        ledger.add(make_trial(1))
        mirror_of(tmp_path / "run", place).start().close()
        ledger.add(make_trial(0))
        mirror_of(tmp_path / "run", place).start().close()
    assert numbers_in(place) == [1, 0]


@pytest.mark.slow
def test_killed_mirror_doubles_and_loses_nothing(tmp_path, place):
    """Killed in mid-copy, again and again; the last one copies the rest."""
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[3])\n"
        "import test_mirror as t\n"
        "t.mirrors.MOST_SHARE = 1.0\n"
        "mirror = t.mirror_of(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
        "print('go', flush=True); mirror.start().close()\n"
    )
    folder = tmp_path / "run"
    ledger_in(folder, 60).close()
    command = [sys.executable, "-c", program, folder, place, Path(__file__).parent]
    paths = os.pathsep.join(sys.path)
    for moment in (0.2, 0.5):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
        ) as child:
            child.stdout.readline()
            time.sleep(moment)
            child.send_signal(signal.SIGKILL)
    mirror_of(folder, place).start().close()
    assert numbers_in(place) == list(range(60))


def test_journal_with_an_unfinished_line_is_mended(tmp_path, caplog):
    path = tmp_path / "mirror.log"
    place = f"journal:{path}"
    with ledger_in(tmp_path / "run", 3) as ledger:
        mirror_of(tmp_path / "run", place).start().close()
        path.write_bytes(path.read_bytes()[:-40])  # as a process killed in writing
        ledger.add(make_trial(3))
        with caplog.at_level(logging.WARNING):
            mirror_of(tmp_path / "run", place).start().close()
    assert "a line that was not finished is taken off" in caplog.text
    assert sorted(numbers_in(place)) == [0, 1, 2, 3]


def test_outage_is_told_once_and_made_up_for(tmp_path, caplog):
    """Its database is locked by another for longer than it waits."""
    path = tmp_path / "mirror.db"
    place = f"sqlite:///{path}"

    def impatient():
        return optuna.storages.RDBStorage(place, {"connect_args": {"timeout": 0.05}})

    with ledger_in(tmp_path / "run", 1) as ledger, caplog.at_level(logging.WARNING):
        mirror = mirror_of(tmp_path / "run", impatient).start()
        soon(lambda: path.exists() and shows(place, [0]))
        caplog.clear()
        with closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN EXCLUSIVE")
            for number in range(1, 4):
                begin = time.monotonic()
                ledger.add(make_trial(number))
                mirror.update()
                assert time.monotonic() - begin < 1  # nobody waits for the mirror
            soon(lambda: "fails" in caplog.text)
            time.sleep(0.5)
            other.rollback()
        soon(lambda: shows(place, range(4)))
        mirror.close()
    assert (
        caplog.text.count("the mirror run fails: database is locked. The run go") == 1
    )
    assert caplog.text.count("the mirror run is back") == 1
    assert "ends behind" not in caplog.text


def test_storage_that_never_answers_does_not_hold_the_end_up(tmp_path, caplog):
    def hanging():
        time.sleep(3)
        raise OSError("no")

    with ledger_in(tmp_path / "run", 1), caplog.at_level(logging.WARNING):
        mirror = mirror_of(tmp_path / "run", hanging).start()
        begin = time.monotonic()
        mirror.close(timeout=0.2)
        assert time.monotonic() - begin < 2
        assert "ends behind the run" in caplog.text
        mirror._thread.join()


def test_deleted_study_is_made_again(tmp_path, place):
    with ledger_in(tmp_path / "run", 2) as ledger:
        with mirror_of(tmp_path / "run", place) as mirror:
            soon(lambda: shown_now(place) == [0, 1])
            optuna.delete_study(study_name="run", storage=storage_of(place)())
            ledger.add(make_trial(2))
            mirror.update()
            soon(lambda: shown_now(place) == [0, 1, 2])


def test_study_of_another_run_is_left_alone(tmp_path, place, caplog):
    for name in ("one", "two"):
        ledger_in(tmp_path / name, 2).close()
    mirror_of(tmp_path / "one", place).start().close()
    with caplog.at_level(logging.WARNING):
        mirror_of(tmp_path / "two", place).start().close()
    assert "the study 'run' there shows another run; give the mirror" in caplog.text
    assert numbers_in(place) == [0, 1]
    mirror_of(tmp_path / "two", place, "second").start().close()
    assert numbers_in(place, "second") == [0, 1]


def test_study_of_a_person_is_left_alone(tmp_path, place, caplog):
    study = optuna.create_study(
        storage=storage_of(place)(), study_name="run", directions=OBJECTIVE.directions
    )
    study.add_trial(optuna.create_trial(values=[1.0, 1.0]))
    with ledger_in(tmp_path / "run", 2), caplog.at_level(logging.WARNING):
        mirror_of(tmp_path / "run", place).start().close()
    assert "shows another run" in caplog.text
    assert len(study_in(place).get_trials()) == 1


def test_copying_takes_no_more_than_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "MOST_SHARE", 0.01)
    place = f"journal:{tmp_path}/mirror.log"
    with ledger_in(tmp_path / "run", 40):
        mirror = mirror_of(tmp_path / "run", place).start()
        soon(lambda: len(shown_now(place)) > 1)
        assert len(shown_now(place)) < 40
        mirror.close()  # hurries
    assert numbers_in(place) == list(range(40))


def test_ledger_is_not_mirrored_into_itself(tmp_path):
    ledger_in(tmp_path).close()
    with pytest.raises(RunError, match="is a ledger; mirror it to another file"):
        storage_of(f"sqlite:///{tmp_path}/ledger.sqlite")


def test_place_that_is_none_is_refused_at_once(tmp_path):
    with pytest.raises(RunError, match="URL cannot be read; it has the form sqlite"):
        mirror_of(tmp_path, "mirror.db")


def test_password_is_not_shown():
    assert "s3cret" not in shown("postgresql://me:s3cret@host/team")
