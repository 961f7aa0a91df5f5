"""A trial, as a row of the ledger."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from autoprune.policy import Policy

State = Literal["running", "complete", "pruned", "diverged", "failed"]
"""Where a trial stands: begun and not finished; or how it ended, with finite metrics,
on fewer windows than the fitness split has, with metrics that are not finite, or with
an error."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One evaluated policy: a row of the ledger.

    Attributes:
        number: Counts from 0, without gaps.
        state: Where it stands, or how it ended.
        origin: The sampler, or the rival or proposal, that it came from.
        policy: What was evaluated.
        params: The policy as Optuna's parameters.
        seed: Derived from the run's and the number.
        started: UTC, ISO 8601.
        finished: UTC, ISO 8601; empty while it is running.
        values: What Optuna was told; none if the trial failed.
        metrics: What was measured, finite or not.
        constraints: How far each limit is exceeded; feasible at zero or less.
        timings: Seconds by part of the trial.
        system_attrs: What the sampler keeps with the trial.
        windows: KL of every window of the fitness split that it was measured on.
        error: Why it failed.
        attempts: How often it was begun.
    """

    number: int
    state: State
    origin: str
    policy: Policy
    params: Mapping[str, str]
    seed: int
    started: str
    finished: str
    values: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    constraints: Mapping[str, float] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    system_attrs: Mapping[str, Any] = field(default_factory=dict)
    windows: tuple[float, ...] = ()
    error: str | None = None
    attempts: int = 1

    @property
    def feasible(self) -> bool:
        """True if it is complete and keeps to every limit."""
        kept = all(value <= 0 for value in self.constraints.values())
        return self.state == "complete" and kept


def utc_now() -> str:
    """Give the time in UTC as ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def to_row(trial: Trial) -> dict[str, Any]:
    """Give a trial as the columns of its row."""
    return {
        "number": trial.number,
        "state": trial.state,
        "origin": trial.origin,
        "policy": json.dumps(trial.policy.to_dict()),
        "params": json.dumps(dict(trial.params)),
        "values": json.dumps(list(trial.values)),
        "metrics": _numbers_to_json(trial.metrics),
        "constraints": _numbers_to_json(trial.constraints),
        "timings": _numbers_to_json(trial.timings),
        "system_attrs": json.dumps(dict(trial.system_attrs)),
        "windows": json.dumps(list(trial.windows)),
        "seed": trial.seed,
        "started": trial.started,
        "finished": trial.finished,
        "error": _plain(trial.error),
        "attempts": trial.attempts,
    }


def from_row(row: Mapping[str, Any]) -> Trial:
    """Read a trial from its row."""
    return Trial(
        number=row["number"],
        state=row["state"],
        origin=row["origin"],
        policy=Policy.from_dict(json.loads(row["policy"])),
        params=json.loads(row["params"]),
        values=tuple(json.loads(row["values"])),
        metrics=_numbers_from_json(row["metrics"]),
        constraints=_numbers_from_json(row["constraints"]),
        timings=_numbers_from_json(row["timings"]),
        system_attrs=json.loads(row["system_attrs"]),
        windows=tuple(json.loads(row["windows"])),
        seed=row["seed"],
        started=row["started"],
        finished=row["finished"],
        error=row["error"],
        attempts=row.get("attempts", 1),  # a reader leaves older tables as they are
    )


def _plain(text: str | None) -> str | None:
    """Write out what no database takes: zeros, and bytes that are no text."""
    if text is None:
        return None
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def _numbers_to_json(numbers: Mapping[str, float]) -> str:
    """Write numbers; JSON has none that are not finite, so these become text."""
    plain = {name: float(value) for name, value in numbers.items()}
    return json.dumps(
        {name: x if math.isfinite(x) else str(x) for name, x in plain.items()}
    )


def _numbers_from_json(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in json.loads(text).items()}
