import json
import math
from datetime import datetime, timedelta

import pytest

from autoprune.policy import Policy
from autoprune.searching.rows import Trial, to_row, utc_now


def make_trial(**changes):
    policy = Policy.from_dict({"actions": {"blocks.0.up": "wanda(sparsity=0.5)"}})
    fields = {
        "number": 3,
        "state": "complete",
        "origin": "random",
        "policy": policy,
        "params": {"blocks.0.up": "wanda(sparsity=0.5)"},
        "seed": 7,
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:01+00:00",
        "metrics": {"kl": 0.5},
        "constraints": {"latency_ms": -0.1},
        "timings": {"evaluate_s": 1.0},
    }
    return Trial(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "feasible"),
    [
        ({}, True),
        ({"constraints": {"latency_ms": 0.0, "kl": 0.1}}, False),
        ({"state": "diverged"}, False),
        ({"state": "failed", "constraints": {}}, False),
    ],
    ids=["kept", "broken", "diverged", "failed"],
)
def test_feasible_is_complete_and_within_limits(changes, feasible):
    assert make_trial(**changes).feasible is feasible


def test_row_is_json_that_any_reader_takes():
    row = to_row(make_trial(metrics={"kl": math.nan, "perplexity": math.inf}))

    def refuse(name):
        raise AssertionError(name)

    metrics = json.loads(row["metrics"], parse_constant=refuse)
    assert metrics == {"kl": "nan", "perplexity": "inf"}


def test_time_is_utc():
    assert datetime.fromisoformat(utc_now()).utcoffset() == timedelta(0)
