import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from autoprune.plugins import PluginRecord
from autoprune.policy import Policy
from autoprune.reporting import tables
from autoprune.reporting.status import RunStatus
from autoprune.searching.rows import Trial

ORIGIN = "uniform sparsegpt(pattern=2:4) + gptq(bits=4, group=64)"
FIGURES = {"perplexity": 20.5, "kl": 0.0625}


def drawn(*parts: str | Table) -> str:
    console = Console(file=io.StringIO(), width=80)
    for part in parts:
        console.print(part, markup=False, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def trial(number: int, **more: Any) -> Trial:
    metrics = {"kl": 0.25, "perplexity": 21.0, "size_bytes": 7e7, "other": 1.0}
    policy = Policy.from_dict({"actions": {"blocks.0.o": "dense"}})
    return Trial(
        **{
            "number": number,
            "state": "complete",
            "origin": ORIGIN,
            "policy": policy,
            "params": {},
            "seed": 0,
            "started": "2026-01-01T00:00:00.000+00:00",
            "finished": "2026-01-01T00:00:01.500+00:00",
            "values": (0.25,),
            "metrics": metrics,
            "timings": {"evaluate_s": 1.5},
        }
        | more
    )


def final(number: int, origin: str) -> dict[str, Any]:
    return {
        "trial": number,
        "origin": origin,
        "report": FIGURES,
        "kl_standard_error": 0.003,
        "sizes": {"packed": 70_000_000, "transformers": 269_000_000},
    }


def finals(rival: int) -> dict[str, Any]:
    return {
        "dense": {"perplexity": 19.0, "kl": 1e-9},
        "dense_sizes": {"packed": 269_000_000, "transformers": 269_000_000},
        "winner": final(9, "nsga2"),
        "rivals": [final(rival, ORIGIN)],
    }


@pytest.mark.parametrize(
    ("name", "number", "text"),
    [
        ("size_bytes", 1.5e9, "1.50 GB"),
        ("size_bytes", 1234.0, "1.23 kB"),
        ("perplexity", 19.0, "19.00"),
        ("perplexity", 12345.6, "12346"),
        ("kl", -7.5e-9, "0"),
        ("kl", 1.847e-4, "0.0001847"),
        ("kl", float("inf"), "inf"),
    ],
)
def test_values_are_for_people(name: str, number: float, text: str) -> None:
    assert tables.value(name, number) == text


def test_a_table_of_trials_fits_80_columns() -> None:
    text = drawn(tables.trials_table([trial(0), trial(12)], ["kl"], title="Best"))
    assert text.startswith("Best")
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for found in ("0.2500", "21.00", "70.00 MB", "sparsegpt(pattern=2:4)", "12"):
        assert found in text
    assert "other" not in text


def test_the_goals_come_first_in_a_table_of_trials() -> None:
    text = drawn(tables.trials_table([trial(0)], ["other"], title="Best"))
    heading = next(line for line in text.splitlines() if "trial" in line)
    assert heading.index("other") < heading.index("kl")


def test_the_final_table_has_dense_rival_and_winner() -> None:
    text = drawn(tables.finals_table(finals(rival=3)))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for found in ("dense", "19.00", "rival, trial 3", "winner, trial 9", "±0.003"):
        assert found in text
    for found in ("269.00 MB", "70.00 MB", "3.84x", "1.00x", "packed", "transformers"):
        assert found in text


def test_a_rival_that_wins_stands_there_once() -> None:
    text = drawn(tables.finals_table(finals(rival=9)))
    assert "rival" not in text


def test_a_status_tells_pace_and_time_left() -> None:
    trials = [trial(0), trial(1)]
    goals = (("kl", "minimize"),)
    status = RunStatus(Path("runs/x"), goals, trials, trials[:1], trials, 42, {})
    text = drawn(*tables.status_parts(status))
    assert "runs/x: 2 of 42 trials (2 complete)" in text
    assert "wanted: minimize kl" in text
    assert "1.5 s a trial, 1 min 00 s left at that pace" in text
    assert "the last ended 2026-01-01 00:00:01 UTC" in " ".join(text.split())
    assert "Best trials" in text
    assert "Front" in text


def test_the_status_of_a_new_run_has_no_tables() -> None:
    status = RunStatus(Path("runs/x"), (("kl", "minimize"),), [], [], [], None, {})
    assert tables.status_parts(status) == [
        "runs/x: 0 trials (none)",
        "wanted: minimize kl",
    ]


def test_plugins_tell_what_they_register_or_why_not() -> None:
    records = [
        PluginRecord(
            "a", "a", "pack 1", ("register_methods",), ("methods:x", "methods:y")
        ),
        PluginRecord("b", "b", "pack 2", ("trial_finished",)),
        PluginRecord("c", "c", "pack 3", error="ImportError: no [module]"),
    ]
    text = drawn(tables.plugins_table(records))
    assert "methods: x, y" in text
    assert "trial_finished" in text
    assert "ImportError: no [module]" in text
