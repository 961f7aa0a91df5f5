"""A night in seconds: real searches by a clock that runs faster."""

import time
from pathlib import Path

import pytest
from tiny_runs import config_of, write_text

from autoprune.run import search
from autoprune.searching.clock import FastClock

NIGHT_S = 8 * 3600
REAL_S = 60.0


@pytest.mark.slow
def test_eight_hours_are_kept_to_the_verified_export(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path),
        search={"budget": "8h", "finalists": 2, "sampler": "random"},
    )
    clock = FastClock(NIGHT_S / REAL_S)
    began = clock.now()
    result = search(config, tmp_path / "run", export=True, clock=clock)
    took = clock.now() - began
    assert result.ended == "time"
    assert len(result.trials) > 20
    (report,) = result.exports
    assert report.verified is not None
    # The seconds of starting processes, a fifth here, are nothing in a real night.
    assert 0.8 * NIGHT_S < took < 1.02 * NIGHT_S


def test_short_night_ends_with_what_there_is(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path),
        search={"trials": 3, "finalists": 2, "sampler": "random"},
    )
    search(config, tmp_path / "run")
    brief = config.search.model_copy(update={"trials": None, "budget": 1})
    short = config.model_copy(update={"search": brief})
    began = time.monotonic()
    result = search(short, tmp_path / "run")
    assert result.ended == "time"
    assert len(result.trials) == 3 and result.finals  # no trial more, and a winner
    assert time.monotonic() - began < 60
