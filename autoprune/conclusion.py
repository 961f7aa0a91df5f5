"""How a run ends: the last choice, the report, and the record of the winner."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoprune.errors import BudgetError, RunError
from autoprune.evaluation.provenance import made_for, measured_on
from autoprune.evaluation.targets import sizes_by_target
from autoprune.reporting.observer import Observer
from autoprune.searching.finals import (
    Cost,
    Finalist,
    elect,
    gains,
    rank,
    report,
    resolve_anew,
    take_candidates,
)
from autoprune.searching.plan import Plan
from autoprune.searching.reserve import Reserve
from autoprune.searching.rivals import rival_kind
from autoprune.searching.rows import Trial
from autoprune.searching.runs import name_of

Recover = Callable[[Sequence[Finalist]], list[Finalist]]
"""Trains finalists, the best first, and gives the best of what comes of it."""


@dataclass(frozen=True, eq=False)
class Searched:
    """A part of a run that has ended.

    Attributes:
        name: Its folder in the run folder; empty for the first round.
        plan: Its plan.
        trials: Its trials.
    """

    name: str
    plan: Plan
    trials: list[Trial]


def conclude(
    parts: Sequence[Searched],
    observer: Observer,
    left: Callable[[], float] = lambda: math.inf,
    reserve: Reserve | None = None,
    recover: Recover | None = None,
) -> tuple[Finalist, dict[str, Any]]:
    """Choose on text the search never saw; report on text that nothing ever saw.

    Args:
        parts: The rounds, and the random search where it is a rival.
        observer: Hears of stages.
        left: Tells how many seconds are left for all that comes.
        reserve: What it is thought to take; finalists are refined as far as there is
            time for it, and more of them where time is left over. None where there is
            no end to the time.
        recover: Trains the finalists, the best first, and gives what is best then;
            None where nothing is trained.

    Returns:
        The winner, and the figures of ``finals.json``.

    Raises:
        RunError: If there is no trial.
        BudgetError: If none keeps every limit.
    """
    plan = parts[0].plan
    cost = plan.cost("choice")
    ranked = _all_ranked(parts, cost, observer)
    elected, rival = elect(ranked, cost)
    first = [elected, *([rival] if rival and rival is not elected else [])]
    resolved = [
        _refined(finalist, cost, observer, plan, how)
        for finalist, how in _to_refine(first, ranked, plan, left, reserve)
    ]
    by_cost = sorted(resolved, key=lambda finalist: cost(finalist.choice))
    trained = recover(by_cost) if recover else []
    winner = min([*resolved, *trained], key=lambda finalist: cost(finalist.choice))
    observer.stage("measuring on the report split")
    shown = resolved[: len(first)]
    shown += [] if winner in shown else [winner]
    shown += _beaten(ranked, shown)
    gain = gains(elected, rival, cost) if rival else ()
    return winner, {
        **_reported(plan, shown, winner),
        "gain_over_rival": dict(zip(("fitness", "choice"), gain, strict=False)),
        "finalists": [
            {
                "trial": name_of(finalist.candidate.part, finalist.candidate.trial),
                "origin": finalist.candidate.origin,
                "choice": finalist.choice.metrics,
            }
            for finalist in ranked
        ],
        "trained": [
            {
                "trial": name_of(finalist.candidate.part, finalist.candidate.trial),
                "schedule": finalist.candidate.policy.schedule,
                "choice": finalist.choice.metrics,
            }
            for finalist in trained
        ],
    }


def _all_ranked(
    parts: Sequence[Searched], cost: Cost, observer: Observer
) -> list[Finalist]:
    """Measure the best of all parts on the choice split, the best first.

    Raises:
        RunError: If there is no trial.
        BudgetError: If none keeps every limit.
    """
    plan = parts[0].plan
    if not any(part.trials for part in parts):
        raise RunError(
            f"the time budget of {plan.config.search.budget:g} s ended before the "
            "first trial. Give more; the variants are kept, not made again"
        )
    ranked: list[Finalist] = []
    refused: list[BudgetError] = []
    for part in parts:
        try:
            ranked += _ranked(part, plan, cost) if part.trials else []
        except BudgetError as error:  # another part may have kept the limits
            observer.note(f"{part.name or 'round 1'}: {error}")
            refused.append(error)
    if not ranked:
        raise refused[0]
    return sorted(ranked, key=lambda finalist: cost(finalist.choice))


def _reported(
    plan: Plan, shown: Sequence[Finalist], winner: Finalist
) -> dict[str, Any]:
    """Measure finalists and the dense model on the report split, and their sizes."""
    reports = [
        report(plan.bench, finalist)
        | {"sizes": sizes_by_target(plan.bench, finalist.candidate.policy)}
        for finalist in shown
    ]
    return {
        "dense": plan.bench.dense_metrics("report"),
        "dense_sizes": sizes_by_target(plan.bench, plan.bench.dense_policy()),
        "winner": reports[shown.index(winner)],
        "rivals": [
            row
            for row, finalist in zip(reports, shown, strict=True)
            if finalist.candidate.is_rival
        ],
    }


def _ranked(part: Searched, first: Plan, cost: Cost) -> list[Finalist]:
    """Measure the best trials of a part of the run on the choice split."""
    count, objective = first.config.search.finalists, first.objective
    found = take_candidates(part.trials, objective, count=count, part=part.name)
    basis = part.plan.reference
    return rank(first.bench, part.plan.bank, found, cost, basis=basis)


def _to_refine(
    first: Sequence[Finalist],
    ranked: Sequence[Finalist],
    plan: Plan,
    left: Callable[[], float],
    reserve: Reserve | None,
) -> Iterator[tuple[Finalist, str]]:
    """Give finalists, the best first, and tell how far each is to be refined.

    Time for trials is over: what others would leave unused refines further ones, while
    one more is in time if it takes as long as the longest so far.
    """
    asked, longest = plan.config.search.refine, 0.0
    for finalist in first:
        began = left()
        how = _refining(asked, began, reserve)
        yield finalist, how
        longest = max(longest, began - left() if how == asked else math.inf)
    if reserve is None or not math.isfinite(left()) or asked == "none":
        return
    for finalist in (one for one in ranked if one not in first):
        began = left()
        if began - reserve.closing < longest:
            return
        yield finalist, asked
        longest = max(longest, began - left())


def _refining(asked: str, left: float, reserve: Reserve | None) -> str:
    """Tell how far the next finalist can be refined, and the rest still be in time."""
    if reserve is None:
        return asked
    spare = left - reserve.closing
    if asked == "mix" and spare >= reserve.solve + reserve.mix:
        return asked
    return "solve" if asked != "none" and spare >= reserve.solve else "none"


def _refined(
    finalist: Finalist, cost: Cost, observer: Observer, plan: Plan, refine: str
) -> Finalist:
    """Solve a finalist anew, and mix it, as far as there is time."""
    trial = name_of(finalist.candidate.part, finalist.candidate.trial)
    if refine != plan.config.search.refine:
        observer.note(f"no time to refine trial {trial} further than {refine!r}")
    if refine == "none":
        return finalist
    observer.stage(f"solving trial {trial} on its own inputs")
    mix = refine == "mix"
    return resolve_anew(plan.bench, finalist, cost, observer.advance, mix=mix)


def _beaten(ranked: Sequence[Finalist], shown: Sequence[Finalist]) -> list[Finalist]:
    """Give the best rival of each kind that is not shown yet, as it was tried."""
    best = {rival_kind(one.candidate.origin): one for one in reversed(ranked)}
    known = {None, *(rival_kind(one.candidate.origin) for one in shown)}
    return [one for kind, one in best.items() if kind not in known]


def winner_record(
    plan: Plan, winner: Finalist, finals: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe the winner so that it can be exported and applied again."""
    return (
        winner.candidate.policy.to_dict()
        | made_for(plan.bench, winner.reference, winner.mix)
        | {
            "trial": name_of(winner.candidate.part, winner.candidate.trial),
            "seed": plan.config.search.seed,
            "text": measured_on(plan.bench, plan.config.text, "report"),
            "figures": {
                "dense": finals["dense"],
                "compressed": finals["winner"]["report"],
            },
            "rivals": [{"name": r["origin"], **r["report"]} for r in finals["rivals"]],
        }
    )
