"""The last choice: finalists on text the search never saw, re-solved, beside rivals.

Every trial used variants made on the inputs of one reference policy. The finalist that
is chosen is solved anew, block by block, on the inputs that its own compressed blocks
give, and the better of the two is kept. The best rival gets the same treatment; the
best of every other kind of rival is reported as it was tried.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autoprune.compression.bank import VariantBank
from autoprune.errors import BudgetError
from autoprune.evaluation.metric import Measured
from autoprune.evaluation.provenance import Mix
from autoprune.evaluation.timed import forecasts
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import Policy
from autoprune.searching.mixing import mixes
from autoprune.searching.objective import Objective, front
from autoprune.searching.rivals import rival_kind
from autoprune.searching.rows import Trial
from autoprune.searching.runs import name_of

Progress = Callable[[int, int], None]

Cost = Callable[[Measured], float]

KEPT = 0.5
"""Share of a gain on the fitness split that has to be there on the choice split."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A policy that may become the result.

    Attributes:
        trial: Number of its trial.
        part: The part of the run that the trial is of, by its folder: ``round-2``;
            empty for the first round.
        origin: Where it came from; see ``rivals.RIVALS`` for those of rivals.
        policy: The policy.
        fitness: What it scored on the split that the search compared trials on.
    """

    trial: int
    origin: str
    policy: Policy
    fitness: Mapping[str, float] = field(default_factory=dict)
    part: str = ""

    @property
    def is_rival(self) -> bool:
        """True for a policy that the search has to beat."""
        return rival_kind(self.origin) is not None


@dataclass(frozen=True, eq=False)
class Finalist:
    """A candidate on the choice split, with the bank that serves it best.

    Attributes:
        candidate: The candidate.
        bank: Whose variants it uses: the search's, those on its own inputs, or a mix.
        choice: What it scored on the choice split.
        reference: The policy whose inputs its variants were made on; None for dense
            ones.
        mix: The sites for which that is not so, and what is; None for no mix.
    """

    candidate: Candidate
    bank: VariantBank
    choice: Measured
    reference: Policy | None = None
    mix: Mix | None = None

    @property
    def resolved(self) -> bool:
        """True if all its variants were made on its own inputs."""
        return self.reference == self.candidate.policy and self.mix is None


def take_candidates(
    trials: Sequence[Trial], objective: Objective, *, count: int, part: str = ""
) -> list[Candidate]:
    """Take the best trials, and the best of each kind of rival with them.

    Args:
        trials: All trials, at least one.
        objective: What is wanted; from a front, the reward picks.
        count: How many, rivals aside.
        part: Of the run, by its folder.

    Raises:
        BudgetError: If none is complete and keeps every limit.
    """
    order = _ordered(trials, objective)
    if not order:
        raise BudgetError(_why_none(trials, objective))
    chosen = order[:count]
    rivals: dict[str, Trial] = {}
    for trial in order:
        if kind := rival_kind(trial.origin):
            rivals.setdefault(kind, trial)
    chosen += [trial for trial in rivals.values() if trial not in chosen]
    return [Candidate(t.number, t.origin, t.policy, t.metrics, part) for t in chosen]


def best_so_far(trials: Sequence[Trial], objective: Objective) -> Policy | None:
    """Take the policy of the best trial; from a front, that of the best reward."""
    order = _ordered(trials, objective)
    return order[0].policy if order else None


def _ordered(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    """List the trials that keep every limit, the best first; a front by reward."""
    if len(objective.goals) > 1:
        beaten_by_none = front(trials, objective)
        return sorted(beaten_by_none, key=lambda trial: -trial.metrics["reward"])
    feasible = [trial for trial in trials if trial.feasible]
    return sorted(feasible, key=objective.costs)


def _why_none(trials: Sequence[Trial], objective: Objective) -> str:
    """Say why no trial can win, and what to do."""
    found = [trial for trial in trials if trial.state == "complete"]
    if not found:
        return (
            f"none of {len(trials)} trials is complete; the last one: "
            f"{trials[-1].error or trials[-1].state}. Allow milder actions"
        )
    limits = ", ".join(f"{x.metric} {x.value:.6g}" for x in objective.limits)
    nearest = min(found, key=lambda trial: max(trial.constraints.values()))
    near = ", ".join(f"{n} {nearest.metrics[n]:.6g}" for n in nearest.constraints)
    return (
        f"none of {len(trials)} trials kept every limit ({limits}); the nearest, trial "
        f"{nearest.number}, has {near}. Relax the limits, or search longer"
    )


def rank(
    bench: Workbench,
    bank: VariantBank,
    candidates: Sequence[Candidate],
    cost: Cost,
    *,
    basis: Policy | None = None,
) -> list[Finalist]:
    """Measure candidates on the choice split, the best first.

    Args:
        bench: Model, tokens and metrics.
        bank: The bank of the search.
        candidates: Different policies.
        cost: What to compare them by; smaller is better.
        basis: Whose inputs the bank was made on.
    """
    finalists = [
        Finalist(one, bank, bench.measure(one.policy, bank, "choice"), basis)
        for one in candidates
    ]
    return sorted(finalists, key=lambda finalist: cost(finalist.choice))


def gains(one: Finalist, start: Finalist, cost: Cost) -> tuple[float, float]:
    """Tell by how much a finalist beats another, on the fitness and choice splits."""
    fitness = [
        cost(Measured(dict(finalist.candidate.fitness), None, {}))
        for finalist in (start, one)
    ]
    return fitness[0] - fitness[1], cost(start.choice) - cost(one.choice)


def elect(ranked: Sequence[Finalist], cost: Cost) -> tuple[Finalist, Finalist | None]:
    """Elect the finalist that goes on, beside the best rival.

    What a search gains on the text that it compared trials on is partly luck. A
    finalist that keeps less than half of its gain over the rival on the choice split is
    passed over; if all are, the rival stands.

    Args:
        ranked: The best on the choice split first.
        cost: What they were ranked by.
    """
    rival = next((one for one in ranked if one.candidate.is_rival), None)
    for one in ranked:
        if rival is None or one is rival:
            return one, rival
        fitness, choice = gains(one, rival, cost)
        if choice >= KEPT * fitness:
            return one, rival
    return ranked[0], rival


def resolve_anew(
    bench: Workbench,
    finalist: Finalist,
    cost: Cost,
    progress: Progress | None = None,
    *,
    mix: bool = True,
) -> Finalist:
    """Solve a finalist on its own inputs, and keep what is best on the choice split.

    Args:
        bench: Model, tokens and metrics.
        finalist: With the variants of the search.
        cost: What to compare by; smaller is better.
        progress: Hears how far the solving is.
        mix: Try at every site the better of both variants, too.

    Returns:
        The finalist as it was, solved anew, or mixed.
    """
    policy = finalist.candidate.policy
    bank = bench.bank(reference=policy)
    bank.make(bench.per_layer(policy).items(), progress)
    measured = bench.measure(policy, bank, "choice")
    own = replace(finalist, bank=bank, choice=measured, reference=policy)
    start, other = sorted((finalist, own), key=lambda one: cost(one.choice))
    found = [start]
    for mixed, sites in mixes(bench, policy, start.bank, other.bank) if mix else ():
        measured = bench.measure(policy, mixed, "choice")
        elsewhere = Mix(other.reference, sites)
        found.append(replace(start, bank=mixed, choice=measured, mix=elsewhere))
    return min(found, key=lambda one: cost(one.choice))


def report(bench: Workbench, finalist: Finalist) -> dict[str, Any]:
    """Measure a finalist on the report split, and tell how sure the figure is."""
    candidate = finalist.candidate
    measured = bench.measure(candidate.policy, finalist.bank, "report")
    assert measured.quality is not None
    return {
        "trial": name_of(candidate.part, candidate.trial),
        "origin": candidate.origin,
        "resolved": finalist.resolved,
        "mixed_sites": len(finalist.mix.sites) if finalist.mix else 0,
        "choice": finalist.choice.metrics,
        "report": measured.metrics,
        "kl_standard_error": measured.quality.kl_error(),
        "latency": forecasts(bench, candidate.policy),
    }
