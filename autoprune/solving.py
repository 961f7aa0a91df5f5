"""Other budgets for a run that was searched: solved for, not measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoprune.errors import ConfigError
from autoprune.limits import Limit
from autoprune.searching.formulate import SIZE
from autoprune.searching.runs import write_text
from autoprune.searching.solve import Solution, solve_front
from autoprune.searching.solve import solve as solve_within


def solve(
    run_dir: str | Path, budgets: Sequence[str], *, out: str | Path | None = None
) -> Solution:
    """Find the best policy of a run within other budgets, without measuring.

    Args:
        run_dir: The run folder.
        budgets: Such as ``size_bytes=30%`` or ``bits_per_weight=3.5``. A number below 1
            without a unit is a share of the dense model, but for shares as such
            (``sparsity=0.6``).
        out: Write the policy there, ready for ``autoprune evaluate``.

    Raises:
        ConfigError: If a budget cannot be read or has no such metric.
        BudgetError: If no policy of the space is within the budgets.
        RunError: If the run has nothing to solve with.
    """
    limits = dict(_limit(text) for text in budgets)
    found = solve_within(Path(run_dir), limits)
    if out is not None:
        record = found.policy.to_dict() | {"solved": to_dict(found)}
        write_text(Path(out), json.dumps(record, indent=2) + "\n")
    return found


def front(run_dir: str | Path, *, count: int, metric: str = SIZE) -> list[Solution]:
    """Find the front of KL against an additive metric, without measuring.

    Raises:
        RunError: If the run has nothing to solve with.
        ConfigError: If the metric is unknown.
    """
    return solve_front(Path(run_dir), metric, count)


def to_dict(found: Solution) -> dict[str, Any]:
    """Give a solution as plain data, its policy aside."""
    return {"metrics": dict(found.metrics), "cost": found.cost, "model": found.model}


def _limit(text: str) -> tuple[str, Limit]:
    name, equals, amount = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(f"a budget is written METRIC=LIMIT, found {text!r}")
    try:
        limit = Limit.parse(amount)
    except ValueError as error:
        raise ConfigError(f"the budget {text!r}: {error}") from error
    if not limit.relative and 0 < limit.value < 1 and not name.endswith("sparsity"):
        limit = Limit(value=limit.value, relative=True)
    return name, limit
