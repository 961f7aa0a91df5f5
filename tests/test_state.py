"""Where a run's rows are: in its folder, in a database, and shown elsewhere."""

from pathlib import Path

import optuna
import pytest
from postgres_server import PostgresServer, binaries
from tiny_runs import config_of, write_text

from autoprune.run import search
from autoprune.searching.runs import read_config, read_trials


def config(checkpoint: Path, folder: Path, **changes):
    asked = {"trials": 5, "finalists": 2, "sampler": "random"}
    return config_of(checkpoint, write_text(folder), search=asked, **changes)


def test_run_is_shown_in_an_optuna_storage(tiny_checkpoint, tmp_path):
    url = f"sqlite:///{tmp_path / 'shown.db'}"
    asked = config(tiny_checkpoint, tmp_path, mirror=url)
    search(asked, tmp_path / "night")
    study = optuna.load_study(study_name="night", storage=url)
    rows = read_trials(tmp_path / "night")
    assert [trial.params for trial in study.trials] == [dict(r.params) for r in rows]
    assert [trial.values for trial in study.trials] == [list(r.values) for r in rows]
    search(asked, tmp_path / "night")  # a finished run doubles nothing
    assert len(optuna.load_study(study_name="night", storage=url).trials) == 5


@pytest.fixture(scope="module")
def postgres_url():
    programs = binaries()
    if programs is None:
        pytest.skip("no PostgreSQL on this machine")
    server = PostgresServer(programs)
    server.sql("CREATE DATABASE team")
    yield server.url("team")
    server.remove()


@pytest.mark.slow
def test_rows_are_in_the_database_that_was_named(
    tiny_checkpoint, tmp_path, postgres_url
):
    asked = config(tiny_checkpoint, tmp_path, ledger=postgres_url)
    result = search(asked, tmp_path / "night")
    assert not (tmp_path / "night" / "ledger.sqlite").exists()
    assert len(read_trials(tmp_path / "night")) == 5
    assert read_config(tmp_path / "night").ledger == postgres_url
    again = search(asked, tmp_path / "night")
    assert again.policy == result.policy
