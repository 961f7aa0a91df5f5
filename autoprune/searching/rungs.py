"""Rungs: how many windows a trial is measured on before it may be given up.

All trials see the same windows in the same order, so two of them compare in pairs: the
difference of a window, not its own hardness, decides.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, SuccessiveHalvingPruner, WilcoxonPruner

from autoprune.searching.objective import Objective
from autoprune.searching.rows import Trial
from autoprune.searching.strategies import notes_of

Pruner = Literal["race", "halving", "wilcoxon", "none"]
"""What ends a trial at a rung: our race, or a pruner of Optuna's."""

REPLACES = 1.0
"""Standard errors by which a policy has to be better to become the incumbent. A step
that was foretold to be better needs no more proof: measured on SmolLM2-135M at 70 %
zeros, ``gradient`` ended at KL 1.252 with 2, at 1.225 with 1, at 1.219 with 0; on other
text at 1.305, 1.288 and 1.287."""

GIVEN_UP = 1.0
"""Standard errors by which a trial may be worse than the incumbent at a rung."""


def rungs_of(tokens: Sequence[int], length: int, total: int) -> tuple[int, ...]:
    """Turn tokens into windows, ascending; the whole split is always the last rung.

    Example:
        >>> rungs_of([500, 2000], length=512, total=24)
        (1, 4, 24)
    """
    counts = {max(1, round(count / length)) for count in tokens}
    return (*sorted(count for count in counts if count < total), total)


def paired(new: Sequence[float], old: Sequence[float]) -> tuple[float, float]:
    """Compare two policies on the windows that both have.

    Returns:
        The mean of new less old, and its standard error; inf for fewer than two.
    """
    count = min(len(new), len(old))
    if not count:
        return 0.0, np.inf
    gaps = np.asarray(new[:count]) - np.asarray(old[:count])
    with np.errstate(invalid="ignore"):  # where one diverged
        error = gaps.std(ddof=1) / count**0.5 if count > 1 else np.inf
    return float(gaps.mean()), float(error)


def replaces(new: Trial, old: Trial, objective: Objective) -> bool:
    """Tell whether a complete trial takes the place of the incumbent.

    With one goal, the KL, it has to be better by a standard error of the paired
    difference; with another goal by any amount.
    """
    if objective.goals == (("kl", "minimize"),) and new.windows and old.windows:
        gap, error = paired(new.windows, old.windows)
        return gap < (-REPLACES * error if np.isfinite(error) else 0.0)
    return objective.costs(new) < objective.costs(old)


def incumbents(trials: Sequence[Trial], objective: Objective) -> list[int]:
    """List the numbers of the trials that were the incumbent, one after the other."""
    found: list[Trial] = []
    for trial in trials:
        if trial.feasible and (not found or replaces(trial, found[-1], objective)):
            found.append(trial)
    return [trial.number for trial in found]


def halving_factor(rungs: Sequence[int]) -> int:
    """Give the factor from one rung of successive halving to the next.

    Example:
        >>> halving_factor([2, 6, 18])
        3
    """
    steps = max(1, len(rungs) - 1)
    factor: float = (rungs[-1] / rungs[0]) ** (1 / steps)
    return max(2, round(factor))


def make_pruner(name: Pruner, rungs: Sequence[int]) -> BasePruner | None:
    """Make Optuna's pruner of a name; None for those that are our own."""
    if name == "halving":
        factor = halving_factor(rungs)
        return SuccessiveHalvingPruner(min_resource=rungs[0], reduction_factor=factor)
    if name == "wilcoxon":
        with warnings.catch_warnings():  # Optuna calls it experimental
            warnings.simplefilter("ignore", ExperimentalWarning)
            return WilcoxonPruner(p_threshold=0.1, n_startup_steps=2)
    return None


def gives_up(
    name: Pruner,
    asked: optuna.Trial,
    windows: Sequence[float],
    incumbent: Trial | None,
    reported: int,
) -> bool:
    """Tell Optuna how a trial stands at a rung, and whether it ends there.

    Args:
        name: The pruner.
        asked: The running trial.
        windows: KL of its windows so far.
        incumbent: What it races; None where there is none yet.
        reported: Windows that were told before.
    """
    if name == "race":
        if incumbent is None:
            return False
        gap, error = paired(windows, incumbent.windows)
        return gap > GIVEN_UP * error
    if name == "halving":
        asked.report(float(np.mean(windows)), step=len(windows))
        return bool(asked.should_prune())
    if name == "wilcoxon":
        for index in range(reported, len(windows)):
            asked.report(float(windows[index]), step=index)
        return bool(asked.should_prune())
    return False


def intermediate(name: Pruner, trial: Trial, rungs: Sequence[int]) -> dict[int, float]:
    """Tell again what was told of a trial, when a study is rebuilt from the ledger."""
    if "rung" in notes_of(trial):
        return {}  # its strategy asked for this many windows: no pruner was
    # What diverges at a rung is told of those before.
    seen = len(trial.windows) - (trial.state == "diverged")
    told = [count for count in rungs[:-1] if count <= seen]
    if name == "halving":
        return {count: float(np.mean(trial.windows[:count])) for count in told}
    if name == "wilcoxon":
        return dict(enumerate(trial.windows[: max(told, default=0)]))
    return {}
