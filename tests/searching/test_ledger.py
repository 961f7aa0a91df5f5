import math
import os
import sqlite3
import subprocess
import sys

import pandas as pd
import pytest

from autoprune.errors import RunError
from autoprune.policy import Policy
from autoprune.searching.ledger import FILE, Ledger
from autoprune.searching.rows import Trial

MADE = {"space": "ab12", "plugins": {"wanda": "1"}}


def make_trial(number, **changes):
    text = f"wanda(sparsity=0.{number + 1})"
    policy = Policy.from_dict({"actions": {"blocks.0.up": text, "head": "dense"}})
    fields = {
        "number": number,
        "state": "complete",
        "origin": "random",
        "policy": policy,
        "params": {"blocks.0.up": text, "head": "dense"},
        "seed": 2**32 - 1,
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:01+00:00",
        "values": (0.5, 2.0),
        "metrics": {"kl": 0.5, "size_bytes": 2.0},
        "constraints": {"latency_ms": -0.1},
        "timings": {"evaluate_s": 1.0},
        "system_attrs": {"generation": 2},
    }
    return Trial(**{**fields, **changes})


def test_trials_come_back_as_they_were_written(tmp_path):
    failed = make_trial(
        2, state="failed", values=(), metrics={}, error="MethodError: no"
    )
    diverged = make_trial(1, state="diverged", metrics={"kl": math.inf})
    written = [make_trial(0), diverged, failed]
    with Ledger.open(tmp_path / "run", MADE) as ledger:
        for trial in written:
            ledger.add(trial)
    with Ledger.open(tmp_path / "run", MADE) as ledger:
        assert [vars(trial) for trial in ledger.trials()] == [
            vars(trial) for trial in written
        ]
        assert ledger.fingerprint == MADE


def test_attributes_of_trial_and_study_are_amended(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        assert ledger.study_attrs == {}
        ledger.add(make_trial(0), {"parents": [0]})
        ledger.add(make_trial(1))
        ledger.amend(1, {"generation": 3})
        assert ledger.study_attrs == {"parents": [0]}
        ledger.amend(1, {"generation": 4}, {"parents": [1]})
        assert [t.system_attrs["generation"] for t in ledger.trials()] == [2, 4]
        assert ledger.study_attrs == {"parents": [1]}


def test_second_run_in_a_folder_is_refused_and_told_who_is_first(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        with pytest.raises(RunError, match=f"goes on in .*: process {os.getpid()} on "):
            Ledger.open(tmp_path, MADE)
        ledger.add(make_trial(0))
    Ledger.open(tmp_path, MADE).close()


def test_other_process_is_refused_too_and_its_death_frees_the_folder(tmp_path):
    program = (
        "import sys, pathlib; from autoprune.searching.ledger import Ledger; "
        "ledger = Ledger.open(pathlib.Path(sys.argv[1]), {'space': 'ab12', "
        "'plugins': {'wanda': '1'}}); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(RunError, match=f"process {other.pid} on "):
            Ledger.open(tmp_path, MADE)
        other.kill()
    Ledger.open(tmp_path, MADE).close()


def test_row_outlives_a_process_that_dies_right_after(tmp_path):
    child = os.fork()
    if not child:
        Ledger.open(tmp_path, MADE).add(make_trial(0))
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    with Ledger.open(tmp_path, MADE) as ledger:
        assert [trial.number for trial in ledger.trials()] == [0]


def test_folder_made_with_something_else_is_refused_key_by_key(tmp_path):
    Ledger.open(tmp_path, MADE).close()
    with pytest.raises(RunError, match="space: 'ab12' then, 'cd34' now") as caught:
        Ledger.open(tmp_path, {"space": "cd34", "plugins": {"wanda": "2"}})
    assert "plugins.wanda: '1' then, '2' now" in str(caught.value)
    Ledger.open(tmp_path, MADE).close()  # the refusal holds no lock


def test_reader_needs_no_lock_and_sees_rows_as_they_come(tmp_path):
    with Ledger.open(tmp_path, MADE) as writer:
        writer.add(make_trial(0))
        with Ledger.read(tmp_path) as reader:
            assert len(reader.trials()) == 1
            writer.add(make_trial(1))
            assert len(reader.trials()) == 2
            with pytest.raises(RunError, match="cannot write trial 2 .*readonly"):
                reader.add(make_trial(2))
    with Ledger.read(tmp_path) as reader:
        assert len(reader.trials()) == 2


def test_folder_without_a_ledger_cannot_be_read(tmp_path):
    with pytest.raises(RunError, match=f"{tmp_path.name} is no run folder"):
        Ledger.read(tmp_path)


@pytest.mark.parametrize("how", ["open", "read"])
def test_file_that_is_no_database_is_refused(tmp_path, how):
    (tmp_path / FILE).write_text(
        "not a database, but long enough to be taken for one" * 9
    )
    with pytest.raises(RunError, match=f"{FILE}: file is not a database"):
        Ledger.open(tmp_path, MADE) if how == "open" else Ledger.read(tmp_path)
    assert "not a database" in (tmp_path / FILE).read_text()


@pytest.mark.parametrize("how", ["open", "read"])
def test_database_of_another_program_is_refused(tmp_path, how):
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("PRAGMA application_id = 255")
        other.execute("CREATE TABLE songs (name TEXT)")
    other.close()
    with pytest.raises(
        RunError, match=r"not a ledger of AutoPrune \(application id 0xff"
    ):
        Ledger.open(tmp_path, MADE) if how == "open" else Ledger.read(tmp_path)


def test_ledger_of_a_newer_autoprune_is_refused(tmp_path):
    Ledger.open(tmp_path, MADE).close()
    with sqlite3.connect(tmp_path / FILE) as newer:
        newer.execute("PRAGMA user_version = 9")
    newer.close()
    with pytest.raises(RunError, match="has format 9, this AutoPrune reads 2"):
        Ledger.open(tmp_path, MADE)


def test_damaged_ledger_is_refused(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        for number in range(9):
            ledger.add(make_trial(number, error="x" * 5000))
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(RunError, match="cannot read the ledger .*malformed"):
        with Ledger.open(tmp_path, MADE) as ledger:
            ledger.trials()


def test_row_with_broken_text_is_refused(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        ledger.add(make_trial(0))
    with sqlite3.connect(tmp_path / FILE) as file:
        file.execute("UPDATE trials SET metrics = '{\"kl\": '")
    file.close()
    with Ledger.read(tmp_path) as ledger:
        with pytest.raises(RunError, match="cannot read the ledger"):
            ledger.trials()


def test_full_disk_is_told_and_loses_nothing(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        ledger.add(make_trial(0))
        ledger._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(
            RunError, match="trial 1 .* disk is full.*kept; free the disk"
        ):
            ledger.add(make_trial(1, error="x" * 100_000))
    with Ledger.open(tmp_path, MADE) as ledger:
        assert [trial.number for trial in ledger.trials()] == [0]
        ledger.add(make_trial(1))


def test_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match="cannot make the run folder .*run"):
        Ledger.open(tmp_path / "run", MADE)


def test_tables_have_a_row_a_trial(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        ledger.add(make_trial(0))
        ledger.add(make_trial(1, state="failed", metrics={}, error="no"))
        frame = ledger.frame()
        csv, parquet = ledger.write_tables()
    assert frame["number"].tolist() == [0, 1]
    assert frame["kl"].isna().tolist() == [False, True]
    columns = {"size_bytes", "time.evaluate_s", "seed", "limit.latency_ms", "site.head"}
    assert columns <= set(frame.columns)
    for table in (pd.read_csv(csv), pd.read_parquet(parquet)):
        assert table["site.blocks.0.up"].tolist() == frame["site.blocks.0.up"].tolist()
        assert table["seed"].tolist() == [2**32 - 1] * 2
    assert sorted(path.name for path in tmp_path.glob("trials*")) == [
        "trials.csv",
        "trials.parquet",
    ]


def test_empty_tables_can_be_written(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        csv, parquet = ledger.write_tables()
    assert "number" in csv.read_text()
    assert len(pd.read_parquet(parquet)) == 0


def test_table_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "trials.csv").mkdir()
    with Ledger.open(tmp_path, MADE) as ledger:
        with pytest.raises(RunError, match="cannot write .*trials.csv"):
            ledger.write_tables()
    assert not list(tmp_path.glob("*.part"))
