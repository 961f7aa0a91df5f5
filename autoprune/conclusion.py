"""How a run ends: the last choice, the report, and the record of the winner."""

from collections.abc import Mapping, Sequence
from typing import Any

from autoprune.errors import RunError
from autoprune.evaluation.provenance import made_for, measured_on
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import Policy
from autoprune.reporting.observer import Observer
from autoprune.searching.finals import (
    Finalist,
    elect,
    gains,
    rank,
    report,
    resolve_anew,
    take_candidates,
)
from autoprune.searching.plan import Plan
from autoprune.searching.rows import Trial


def conclude(
    plans: Sequence[Plan], trials: Sequence[list[Trial]], observer: Observer
) -> tuple[Finalist, dict[str, Any]]:
    """Choose on text the search never saw; report on text that nothing ever saw.

    Args:
        plans: Of the rounds.
        trials: Of each round.
        observer: Hears of stages.

    Returns:
        The winner, and the figures of ``finals.json``.

    Raises:
        RunError: If there is no trial.
        BudgetError: If none keeps every limit.
    """
    plan, count = plans[0], plans[0].config.search.finalists
    if not any(trials):
        raise RunError(
            f"the time budget of {plan.config.search.budget:g} s ended before the "
            "first trial. Give more; the variants are kept, not made again"
        )
    cost = plan.cost("choice")
    ranked: list[Finalist] = []
    for one, rows in zip(plans, trials, strict=True):
        candidates = take_candidates(rows, plan.objective, count=count) if rows else []
        ranked += rank(plan.bench, one.bank, candidates, cost, basis=one.reference)
    ranked.sort(key=lambda finalist: cost(finalist.choice))
    elected, rival = elect(ranked, cost)
    resolved = []
    for finalist in [elected, *([rival] if rival and rival is not elected else [])]:
        observer.stage(f"solving trial {finalist.candidate.trial} on its own inputs")
        resolved.append(resolve_anew(plan.bench, finalist, cost, observer.advance))
    winner = min(resolved, key=lambda finalist: cost(finalist.choice))
    observer.stage("measuring on the report split")
    reports = [
        report(plan.bench, finalist)
        | {"sizes": _sizes(plan.bench, finalist.candidate.policy)}
        for finalist in resolved
    ]
    gain = gains(elected, rival, cost) if rival else ()
    return winner, {
        "dense": plan.bench.dense_metrics("report"),
        "dense_sizes": _sizes(plan.bench, plan.bench.dense_policy()),
        "winner": reports[resolved.index(winner)],
        "gain_over_rival": dict(zip(("fitness", "choice"), gain, strict=False)),
        "rivals": [
            row
            for row, finalist in zip(reports, resolved, strict=True)
            if finalist.candidate.is_rival
        ],
        "finalists": [
            {
                "trial": finalist.candidate.trial,
                "origin": finalist.candidate.origin,
                "choice": finalist.choice.metrics,
            }
            for finalist in ranked
        ],
    }


def _sizes(bench: Workbench, policy: Policy) -> dict[str, int]:
    """Tell the bytes of a policy in every export target, the run's own first."""
    storages = bench.storages(policy)
    exporters = {bench.exporter.name: bench.exporter, **bench.exporters}
    return {
        name: exporter.size_bytes(storages, bench.untouched)
        for name, exporter in exporters.items()
    }


def winner_record(
    plan: Plan, winner: Finalist, finals: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe the winner so that it can be exported and applied again."""
    return (
        winner.candidate.policy.to_dict()
        | made_for(plan.bench, winner.reference)
        | {
            "trial": winner.candidate.trial,
            "seed": plan.config.search.seed,
            "text": measured_on(plan.bench, plan.config.text, "report"),
            "figures": {
                "dense": finals["dense"],
                "compressed": finals["winner"]["report"],
            },
            "rivals": [{"name": r["origin"], **r["report"]} for r in finals["rivals"]],
        }
    )
