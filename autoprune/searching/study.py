"""The search itself, from a problem and a crew to rows in the ledger."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from autoprune.searching.crew import Crew, LocalCrew
from autoprune.searching.driving import DEATHS, TRIES, Search
from autoprune.searching.ends import Ends, Reason
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Objective
from autoprune.searching.problem import Problem, Proposal
from autoprune.searching.rows import Trial
from autoprune.searching.rungs import Pruner
from autoprune.searching.strategies import Brief, SamplerFactory
from autoprune.searching.trial import Evaluator

__all__ = ["DEATHS", "TRIES", "run_study"]


def run_study(
    problem: Problem,
    crew: Crew | Evaluator,
    *,
    ledger: Ledger,
    sampler: SamplerFactory,
    objective: Objective,
    seed: int,
    rungs: tuple[int, ...] = (),
    pruner: Pruner = "race",
    sensitivities: Float[np.ndarray, "sites choices"] | None = None,
    ends: Ends,
    proposals: Sequence[Proposal] = (),
    on_trial: Callable[[Trial], None] | None = None,
) -> Reason:
    """Search, from where the ledger stands, until there is a reason to end.

    Args:
        problem: What may be chosen, its prices and budgets.
        crew: Measures policies; an evaluator does so in this process. What it raises
            fails the trial, and the search goes on.
        ledger: Open for writing.
        sampler: The strategy.
        objective: What is wanted.
        seed: Of everything random; equal seed and measurements, equal policies.
        rungs: Windows at which a trial may end, ascending; the last is the whole split.
            Empty for no rungs.
        pruner: What ends a trial at a rung before the last.
        sensitivities: What every choice costs by itself, if the strategy needs it.
        ends: When no more trials are begun.
        proposals: Policies to try first. One that the ledger has, or that is over a
            budget, is left out.
        on_trial: Called after the row of a trial is on disk.

    Returns:
        Why it ended. The trials stand in the ledger.

    Raises:
        ConfigError: If a goal or limit is not among the metrics.
        BudgetError: If no policy of the space is within the budgets.
        PolicyError: If a proposal does not fit the space.
        RunError: If the ledger cannot be written.
        Exception: Whatever the crew raised in ``judge.FAILURES`` trials in a row.
    """
    brief = Brief(
        seed=seed,
        objectives=len(objective.goals),
        problem=problem,
        history=ledger.trials(),
        sensitivities=sensitivities,
        rungs=rungs,
    )
    crew = crew if isinstance(crew, Crew) else LocalCrew(crew)
    search = Search(brief, objective, ledger, sampler, crew, pruner, ends)
    search.start(problem.admitted(proposals), on_trial or (lambda trial: None))
    return crew.drive(search)
