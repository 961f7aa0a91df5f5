"""The parts of a run: its rounds, and the random search where that is a rival."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float

from autoprune.conclusion import Searched
from autoprune.errors import RunError
from autoprune.preflight import preflight
from autoprune.reporting.observer import SEARCHING, Observer
from autoprune.searching.clock import Timetable
from autoprune.searching.crew import Crew
from autoprune.searching.ends import Ends, Reason
from autoprune.searching.finals import best_so_far
from autoprune.searching.frozen import FrozenProblem
from autoprune.searching.ledger import Ledger
from autoprune.searching.mirror import Mirror
from autoprune.searching.plan import Plan
from autoprune.searching.preparing import make_together, measure_together
from autoprune.searching.problem import Proposal
from autoprune.searching.reserve import Reserve
from autoprune.searching.rivals import as_random_rival, random_rival, solved_rivals
from autoprune.searching.rows import Trial
from autoprune.searching.sensitivity import Sensitivities
from autoprune.searching.study import run_study

RANDOM_RIVAL = "rival-random"
"""Folder of the random search in a run folder."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a run.

    Attributes:
        place: Its folder in the run folder; empty for the first round.
        share: Of the time for trials, what is spent when it ends.
        plan: Its plan.
        ledger: Its rows, open for writing.
    """

    place: str
    share: float
    plan: Plan
    ledger: Ledger

    @property
    def searched(self) -> Searched:
        """The part with its trials, those of the random search as rivals."""
        trials = self.ledger.trials()
        if self.place == RANDOM_RIVAL:
            trials = as_random_rival(trials)
        return Searched(self.place, self.plan, trials)


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What all parts of a run share.

    Attributes:
        crew: Who evaluates.
        table: The time.
        observer: Hears of all.
        stop: Asked between trials.
        room: Asked between trials whether the disk has room.
        export: Whether the winner will be exported.
    """

    crew: Crew
    table: Timetable
    observer: Observer
    stop: Callable[[], bool]
    room: Callable[[], bool]
    export: bool


def plans_of(
    first: Plan, searched: Sequence[Part], observer: Observer
) -> Iterator[tuple[str, float, Plan]]:
    """Give the searches of a run, each planned when those before it have ended.

    Args:
        first: The plan of the first round.
        searched: The parts so far; grows from outside.
        observer: Hears of each.

    Yields:
        The part's folder in the run folder, the share of the time that is spent when it
        ends, and its plan.
    """
    rounds, rivals = first.config.search.rounds, first.config.search.rivals
    last = 0.5 if "random" in rivals else 1.0
    yield "", last / rounds, first
    for number in range(2, rounds + 1):
        yield f"round-{number}", last * number / rounds, _next_round(searched, observer)
    if "random" in rivals:
        observer.note("a rival: random search for as long")
        trials = sum(len(part.ledger.trials()) for part in searched)
        yield RANDOM_RIVAL, 1.0, random_rival(first, trials)


def search_part(part: Part, around: Surroundings) -> Reason:
    """Make the variants of a part's plan and search among them; tell why it ended."""
    plan, ledger, observer = part.plan, part.ledger, around.observer
    around.crew.enter(plan)
    sensitivities, proposals = _prepared(part, around)
    frozen = FrozenProblem.of(plan.bench, plan.problem.space, sensitivities)
    frozen.write(ledger.run_dir)
    trials = ledger.trials()
    observer.aim(plan.objective.goals, trials)
    observer.stage(SEARCHING)
    config = plan.config.search
    with _mirrored(part) as update:

        def on_trial(trial: Trial) -> None:
            trials.append(trial)
            update()
            observer.trial(trial)
            observer.advance(trial.number + 1, config.trials)
            plan.plugins.notify("trial_finished", trial=trial, run_dir=ledger.run_dir)

        ended = run_study(
            plan.problem,
            around.crew,
            ledger=ledger,
            sampler=plan.strategy,
            objective=plan.objective,
            seed=config.seed,
            rungs=plan.rungs,
            pruner=config.pruner,
            sensitivities=sensitivities,
            ends=_ends(part, around, trials),
            proposals=proposals,
            on_trial=on_trial,
        )
    ledger.write_tables()
    return ended


def _prepared(
    part: Part, around: Surroundings
) -> tuple[Float[np.ndarray, "sites choices"] | None, list[Proposal]]:
    """Make variants, and measure what a search wants to know before its first trial."""
    plan, ledger, observer = part.plan, part.ledger, around.observer
    table, first = around.table, not part.place
    _make_variants(plan, around)
    if first and not ledger.trials():
        observer.stage("exporting the smallest policy, to be sure")
        with table.timing("preflight"):
            preflight(plan, ledger.run_dir)
    observer.stage("measuring the dense model")
    with table.timing("dense"):
        plan.bench.teacher("fitness")
    measured, kind = _sensitivities(plan, around.crew), plan.config.search.sensitivity
    sensitivities = None
    if "sensitivities" in plan.strategy.needs:
        observer.stage(f"measuring sensitivities ({kind})")
        sensitivities = measured.costs(kind)
    proposals = list(plan.proposals)
    if first:
        table.keep(ledger.run_dir)
        proposals += solved_rivals(plan, measured, observer.stage, known=sensitivities)
    return sensitivities, proposals


def _ends(part: Part, around: Surroundings, trials: Sequence[Trial]) -> Ends:
    """Tell when a part ends; ``trials`` grow from outside."""
    plan, table = part.plan, around.table
    return _InTime(
        trials=plan.config.search.trials,
        stop=around.stop,
        room=around.room,
        clock=table.clock,
        estimate=lambda: Reserve.of(plan, table, trials, export=around.export),
        table=table,
        share=part.share,
    )


@contextmanager
def _mirrored(part: Part) -> Iterator[Callable[[], None]]:
    """Show a part in the Optuna storage that was asked for, while it is searched.

    Yields:
        To be called after a row is on disk.
    """
    plan, folder = part.plan, part.ledger.run_dir
    storage = plan.config.mirror
    if storage is None:
        yield lambda: None
        return
    root = folder.parent if part.place else folder
    name = root.resolve().name + (f"/{part.place}" if part.place else "")
    with Mirror(
        storage,
        name,
        objective=plan.objective,
        distributions=plan.problem.space.distributions(),
        folder=folder,
    ) as mirror:
        yield mirror.update


def _sensitivities(plan: Plan, crew: Crew) -> Sensitivities:
    """Give what choices cost, measured here or by the crew, each worker a share."""
    together = partial(measure_together, crew) if crew.size > 1 else None
    space = plan.problem.space
    return Sensitivities(plan.bench, plan.bank, space, measure=together)


def _make_variants(plan: Plan, around: Surroundings) -> None:
    """Make what is missing: here, or by the crew, each worker some blocks."""
    observer, crew = around.observer, around.crew
    observer.stage("making variants")
    start, missing = time.monotonic(), len(plan.bank.missing(plan.pairs))

    def tell() -> None:
        left = len(plan.bank.missing(plan.pairs))
        observer.advance(missing - left, missing)

    with around.table.timing("variants" if missing else "variants_found"):
        if crew.size > 1 and missing:
            made = make_together(crew, tell)
        else:
            made = plan.bank.make(plan.pairs, observer.advance)
    if plan.filtered is not None and made:
        saved = plan.filtered.saved_seconds((time.monotonic() - start) / made)
        observer.note(
            f"{plan.filtered.variants} variants left out: {saved:.0f} s saved; by the "
            f"cheap scores the best policy is {plan.filtered.foreseen:.1%} worse for it"
        )
    plan.bench.store.shrink()


@dataclass(frozen=True, eq=False)
class _InTime(Ends):
    """Ends whose deadline follows what trials have shown of what comes after them."""

    estimate: Callable[[], Reserve] | None = None
    table: Timetable | None = None
    share: float = 1.0

    def reason(self, begun: int, mean_s: float, *, waiting: bool) -> Reason | None:
        """Say why no trial is to be begun now, by the newest estimate."""
        now: Ends = self
        if self.table and self.table.budget and self.estimate:
            # The first trial tells what the others, and what follows, will take.
            reserved = self.estimate().total if begun else 0.0
            deadline = self.table.end(self.share, reserved)
            now = replace(self, deadline=deadline, table=None)
        return Ends.reason(now, begun, mean_s, waiting=waiting)


def _next_round(searched: Sequence[Part], observer: Observer) -> Plan:
    """Plan a round around the best policy of the one before."""
    part = searched[-1]
    incumbent = best_so_far(part.ledger.trials(), part.plan.objective)
    if incumbent is None:
        raise RunError(
            f"no trial of round {len(searched)} kept every limit, so there is nothing "
            "to search around. Relax the limits, or give more trials or time"
        )
    observer.note(f"round {len(searched) + 1}: half the step, on new inputs")
    return part.plan.around(incumbent)
