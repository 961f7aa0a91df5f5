import pytest

from autoprune.errors import RunError
from autoprune.policy import Policy
from autoprune.searching.rows import Trial
from autoprune.searching.tables import COLUMNS, frame_of, write_tables

TRIAL = Trial(
    number=0,
    state="complete",
    origin="random",
    policy=Policy.from_dict({"actions": {"blocks.0.up": "wanda(sparsity=0.5)"}}),
    params={"blocks.0.up": "wanda(sparsity=0.5)"},
    seed=7,
    started="2026-01-01T00:00:00+00:00",
    finished="2026-01-01T00:00:01+00:00",
    metrics={"kl": 0.5},
    constraints={"latency_ms": -0.1},
    timings={"evaluate_s": 1.0},
)


def test_table_keeps_the_kinds_of_columns_apart():
    (line,) = frame_of([TRIAL]).to_dict("records")
    assert line["kl"] == 0.5
    assert line["limit.latency_ms"] == -0.1
    assert line["time.evaluate_s"] == 1.0
    assert line["site.blocks.0.up"] == "wanda(sparsity=0.5)"
    assert line["policy"] == TRIAL.policy.fingerprint
    assert line["feasible"]


def test_table_of_nothing_has_columns():
    assert frame_of([]).columns.tolist() == COLUMNS
    assert set(COLUMNS) <= set(frame_of([TRIAL]).columns)


def test_older_tables_stay_where_new_ones_cannot_be_written(tmp_path):
    write_tables(frame_of([TRIAL]), tmp_path)
    before = (tmp_path / "trials.csv").read_bytes()
    (tmp_path / "trials.parquet").unlink()
    (tmp_path / "trials.parquet").mkdir()
    with pytest.raises(RunError, match="cannot write .*trials.parquet"):
        write_tables(frame_of([TRIAL]), tmp_path)
    assert (tmp_path / "trials.csv").read_bytes() == before
