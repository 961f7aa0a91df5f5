import errno
import fcntl
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime

import pandas as pd
import pytest

from autoprune.errors import RunError
from autoprune.policy import Policy
from autoprune.searching import backups, sqlite_file
from autoprune.searching.backups import BACKUP
from autoprune.searching.ledger import FILE, Ledger
from autoprune.searching.locking import check_file_system
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


def test_begun_trial_is_apart_until_it_is_finished(tmp_path):
    begun = make_trial(0, state="running", finished="", values=(), metrics={})
    with Ledger.open(tmp_path, MADE) as ledger:
        ledger.begin(begun, {"parents": [7]})
        assert [vars(trial) for trial in ledger.running()] == [vars(begun)]
        assert ledger.trials() == []
        assert len(ledger.frame()) == 0
        assert ledger.study_attrs == {"parents": [7]}
        ledger.begin(replace(begun, attempts=2))
        assert [trial.attempts for trial in ledger.running()] == [2]
        ledger.add(make_trial(0, attempts=2))
        assert ledger.running() == []
        assert [vars(t) for t in ledger.trials()] == [vars(make_trial(0, attempts=2))]


def test_finished_trial_is_not_written_over(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        ledger.add(make_trial(0))
        again = make_trial(0, metrics={"kl": 9.0})
        with pytest.raises(RunError, match="trial 0 is finished already in .*sqlite"):
            ledger.add(again, {"parents": [7]})
        with pytest.raises(RunError, match="trial 0 is finished already"):
            ledger.begin(make_trial(0, state="running"))
        assert [vars(trial) for trial in ledger.trials()] == [vars(make_trial(0))]
        assert ledger.study_attrs == {}


def test_trial_is_begun_running_and_added_finished(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        with pytest.raises(ValueError, match="trial 0 is complete, not running"):
            ledger.begin(make_trial(0))
        with pytest.raises(ValueError, match="trial 0 is not finished"):
            ledger.add(make_trial(0, state="running"))


def as_format_2(run_dir):
    """Make the tables of a ledger those that AutoPrune wrote before attempts."""
    with sqlite3.connect(run_dir / FILE) as older:
        older.execute("ALTER TABLE trials DROP COLUMN attempts")
        older.execute("PRAGMA user_version = 2")
    older.close()


def test_folder_of_format_2_is_read_as_it_is_and_migrated_by_a_writer(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        ledger.add(make_trial(0))
    as_format_2(tmp_path)
    with Ledger.read(tmp_path) as ledger:
        assert [vars(trial) for trial in ledger.trials()] == [vars(make_trial(0))]
    for number in (1, 2):
        with Ledger.open(tmp_path, MADE) as ledger:
            ledger.begin(make_trial(number, state="running", attempts=3))
            ledger.add(make_trial(number, attempts=3))
    with Ledger.read(tmp_path) as ledger:
        assert [trial.attempts for trial in ledger.trials()] == [1, 3, 3]


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
    with pytest.raises(RunError, match="has format 9, this AutoPrune reads 3"):
        Ledger.open(tmp_path, MADE)


def damage(run_dir):
    path = run_dir / FILE
    path.write_bytes(path.read_bytes()[:9000])


def test_damaged_ledger_is_refused(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        for number in range(9):
            ledger.add(make_trial(number, error="x" * 5000))
    damage(tmp_path)
    (tmp_path / BACKUP).unlink()
    with pytest.raises(RunError, match="cannot read the ledger .*Take a copy from"):
        Ledger.open(tmp_path, MADE)
    with pytest.raises(RunError, match="cannot read the ledger .*malformed"):
        with Ledger.read(tmp_path) as ledger:
            ledger.trials()


def test_damaged_ledger_names_its_copy_and_the_command_that_restores_it(tmp_path):
    folder = tmp_path / "a run"
    with Ledger.open(folder, MADE) as ledger:
        for number in range(9):
            ledger.add(make_trial(number, error="x" * 5000))
        ledger.begin(make_trial(9, state="running"))
    made = datetime.fromtimestamp((folder / BACKUP).stat().st_mtime, UTC)
    damage(folder)
    message = rf"copy of {made:%Y-%m-%d %H:%M:%S} UTC with 9 trials"
    with pytest.raises(RunError, match=message) as caught:
        Ledger.open(folder, MADE)
    command = str(caught.value).splitlines()[-1]
    for name in ("-wal", "-shm"):  # as a killed process leaves them
        (folder / (FILE + name)).write_bytes(b"of the damaged file" * 99)
    subprocess.run(command, shell=True, check=True)
    with Ledger.open(folder, MADE) as ledger:
        assert len(ledger.trials()) == 9
        assert [trial.number for trial in ledger.running()] == [9]
    assert (folder / "damaged.sqlite").stat().st_size == 9000


def test_damaged_copy_is_not_offered(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        for number in range(9):
            ledger.add(make_trial(number, error="x" * 5000))
    damage(tmp_path)
    (tmp_path / BACKUP).write_bytes(b"nothing" * 999)
    with pytest.raises(RunError, match="Take a copy from before, or choose"):
        Ledger.open(tmp_path, MADE)


def test_lost_ledger_is_not_begun_anew_beside_its_copy(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        ledger.add(make_trial(0))
    (tmp_path / FILE).unlink()
    with pytest.raises(RunError, match="is gone.*copy of .* with 1 trials") as caught:
        Ledger.open(tmp_path, MADE)
    subprocess.run(str(caught.value).splitlines()[-1], shell=True, check=True)
    with Ledger.open(tmp_path, MADE) as ledger:
        assert [trial.number for trial in ledger.trials()] == [0]


def copied(run_dir):
    """Count the trials in the copy of a ledger; None if there is no copy."""
    if not (run_dir / BACKUP).exists():
        return None
    with closing(sqlite3.connect(run_dir / BACKUP)) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return copy.execute("SELECT count(*) FROM trials").fetchone()[0]


def test_ledger_is_copied_every_five_minutes_of_writing_and_at_the_end(tmp_path):
    now = [1000.0]
    with Ledger.open(tmp_path, MADE, clock=lambda: now[0]) as ledger:
        for number, (minutes, expected) in enumerate(
            [(0, None), (4, None), (6, 3), (10, 3), (11, 5)]
        ):
            now[0] = 1000 + 60 * minutes
            ledger.add(make_trial(number))
            assert copied(tmp_path) == expected
        ledger.add(make_trial(5))
    assert copied(tmp_path) == 6
    before = (tmp_path / BACKUP).stat().st_mtime_ns
    Ledger.open(tmp_path, MADE).close()
    assert (tmp_path / BACKUP).stat().st_mtime_ns == before  # nothing was written
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", BACKUP, FILE]


def test_copy_is_made_while_others_read(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger, Ledger.read(tmp_path) as reader:
        ledger.add(make_trial(0))
        assert len(reader.trials()) == 1
        ledger.close()
        assert copied(tmp_path) == 1
        assert len(reader.trials()) == 1


def test_copy_that_fails_is_told_once_and_ends_nothing(tmp_path, caplog):
    now = [0.0]
    (tmp_path / BACKUP).mkdir()  # where the copy would stand
    with Ledger.open(tmp_path, MADE, clock=lambda: now[0]) as ledger:
        for number in range(4):
            now[0] += 400
            ledger.add(make_trial(number))
    assert caplog.text.count("cannot copy the ledger") == 1
    with Ledger.read(tmp_path) as ledger:
        assert len(ledger.trials()) == 4
    assert not list(tmp_path.glob("*.part"))


def test_copy_of_a_large_ledger_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    now = [0.0]

    def slow(source, target):
        now[0] += 60
        made.append(now[0])

    made = []
    monkeypatch.setattr(backups, "_copy", slow)
    with Ledger.open(tmp_path, MADE, clock=lambda: now[0]) as ledger:
        for number in range(20):
            now[0] += 600
            ledger.add(make_trial(number))
        assert made == [660, 6720]  # both 600 s and 100 times 60 s are over


def test_killed_copy_leaves_nothing_behind(tmp_path):
    (tmp_path / f"{BACKUP}.77.part").write_bytes(b"half")
    (tmp_path / f"{BACKUP}.77.part-journal").write_bytes(b"half")
    Ledger.open(tmp_path, MADE).close()
    assert not list(tmp_path.glob("*.part*"))


def test_file_system_without_shared_memory_is_refused(tmp_path, monkeypatch):
    """SQLite's own access without it takes the place of such a file system."""
    connect = sqlite3.connect

    def without(path, **options):
        return connect(f"{path.as_uri()}?vfs=unix-dotfile", uri=True, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_file.sqlite3, "connect", without)
        with pytest.raises(RunError, match="no shared memory.*mode delete.*PostgreSQL"):
            Ledger.open(tmp_path, MADE)
    Ledger.open(tmp_path, MADE).close()  # the refusal holds no lock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with pytest.raises(
            RunError, match="has no locks .*two runs.*--ledger postgres"
        ):
            Ledger.open(tmp_path, MADE)
    assert not (tmp_path / FILE).exists()
    Ledger.open(tmp_path, MADE).close()


def test_network_file_system_is_refused(tmp_path):
    mounts = tmp_path / "mountinfo"
    here = str(tmp_path / "my runs").replace(" ", r"\040")
    mounts.write_text(
        "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        f"95 22 0:45 / {here} rw shared:7 - nfs4 server:/home rw,vers=4.2\n"
        f"96 95 0:46 / {here}/local rw - xfs /dev/vdb rw\n"
    )
    run = tmp_path / "my runs"
    with pytest.raises(RunError, match=r"network file system \(nfs4\).*--ledger postg"):
        check_file_system(run / "one", mounts)
    check_file_system(run / "local" / "one", mounts)
    check_file_system(tmp_path / "my runs too", mounts)
    check_file_system(run / "one", tmp_path / "none")  # a system that does not tell


def test_rows_are_asked_for_by_number(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        for number in (2, 0, 1):
            ledger.add(make_trial(number))
        ledger.begin(make_trial(3, state="running"))
        assert ledger.numbers() == [0, 1, 2]
        assert [trial.number for trial in ledger.trials([2, 0, 3, 9])] == [0, 2]
        many = ledger.trials(range(1200))
        assert [trial.number for trial in many] == [0, 1, 2]


def test_ledger_has_a_name_that_no_other_has(tmp_path):
    names = []
    for folder in ("one", "two", "one"):
        with Ledger.open(tmp_path / folder, MADE) as ledger:
            names.append(ledger.identity)
    assert names[0] == names[2] != names[1]


def test_part_of_a_run_has_its_own_file(tmp_path):
    with Ledger.open(tmp_path, MADE, part="round-2") as ledger:
        ledger.add(make_trial(0))
        assert ledger.run_dir == tmp_path / "round-2"
    assert (tmp_path / "round-2" / FILE).is_file()
    for reading in ((tmp_path, "round-2"), (tmp_path / "round-2",)):
        with Ledger.read(*reading) as ledger:
            assert ledger.numbers() == [0]


def test_error_with_any_bytes_is_kept(tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        ledger.add(make_trial(0, state="failed", error="\0 \ud800 ü"))
        assert [trial.error for trial in ledger.trials()] == ["\\0 \\ud800 ü"]


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
        ledger._database._raw.execute("PRAGMA max_page_count = 1")
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
