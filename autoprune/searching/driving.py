"""A search that goes on: gives out trials to a crew, takes in what came of them."""

import logging
import math
from bisect import insort
from collections.abc import Callable, Iterator, Sequence

from autoprune.errors import RunError
from autoprune.searching.asking import Asked, Asking
from autoprune.searching.crew import Crew, Outcome, TakeSlopes
from autoprune.searching.ends import Ends, Reason
from autoprune.searching.judge import Judge
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Objective
from autoprune.searching.problem import Proposal
from autoprune.searching.rows import Trial
from autoprune.searching.rungs import Pruner
from autoprune.searching.strategies import Brief, ExhaustedError, SamplerFactory
from autoprune.searching.survey import Survey
from autoprune.searching.trial import Score
from autoprune.searching.underway import Underway

log = logging.getLogger(__name__)

TRIES = 3
"""How often a trial is begun whose driver died in the middle of it."""

DEATHS = 2
"""Workers that a policy may kill; a third one it does not get."""

POLL_S = 0.5
"""Seconds after which the driver looks up while workers work: is it to stop?"""


class Search:
    """A search that goes on, between the ledger and a crew.

    Attributes:
        rungs: Windows at which a trial may end; empty for no rungs.
        pruner: What ends it there.
        needs: What has to be measured for its strategy.
        history: The trials that it began with.
    """

    def __init__(
        self,
        brief: Brief,
        objective: Objective,
        ledger: Ledger,
        factory: SamplerFactory,
        crew: Crew,
        pruner: Pruner,
        ends: Ends,
    ) -> None:
        self._trials = list(brief.history)
        self._latest = self._trials[-1] if self._trials else None
        self.rungs, self.pruner, self.needs = brief.rungs, pruner, factory.needs
        self.history = tuple(brief.history)
        self._objective = objective
        self._crew = crew
        self._ends = ends
        self._now = ends.clock.now
        self._survey = Survey(ledger, factory, crew.size)
        self._judge = Judge(objective, brief.rungs, pruner, self._trials)
        slopes = self._survey.slopes
        self._asking = Asking(brief, objective, ledger, factory, pruner, slopes)
        self._busy: dict[int, Underway | tuple[TakeSlopes, float]] = {}
        self._again: list[Underway] = []
        self._walls: list[float] = []
        self._slopes_s = 0.0
        self._cleared = -1
        self._queue: list[Proposal] = []
        self._on_trial: Callable[[Trial], None] = lambda trial: None

    def start(
        self, proposals: Sequence[Proposal], on_trial: Callable[[Trial], None]
    ) -> None:
        """Take up what was left unfinished, and what is to be tried first."""
        self._queue, self._on_trial = list(proposals), on_trial
        for finished in self._take_up(self._asking.orphans):
            on_trial(finished)

    def run(self) -> Reason:
        """Search until there is a reason to end, and nothing is underway."""
        while True:
            ended = self._give_out()
            if ended and not self._busy:
                return ended
            for outcome in self._crew.wait(POLL_S):
                self.hear(outcome)

    @property
    def busy(self) -> int:
        """How many workers have something to do."""
        return len(self._busy)

    def hear(self, outcome: Outcome) -> None:
        """Take in what came of a job.

        Raises:
            Exception: What the job raised, if the last trials all failed.
        """
        if ended_trial := self._hear(outcome):
            self._tell(ended_trial)

    def end(self, worker: int, score: Score, *, whole: bool) -> None:
        """End a worker's trial with its last score: another pruner than ours said so.

        Raises:
            RunError: If its row cannot be written.
        """
        work = self._busy.pop(worker)
        assert isinstance(work, Underway)
        self._tell(self._finish(work, score, whole))

    def rung_of(self, worker: int) -> int | None:
        """Tell to which rung a worker's trial is to be measured; None for all."""
        work = self._busy[worker]
        return work.asked.rung if isinstance(work, Underway) else None

    def has(self, worker: int) -> bool:
        """Tell whether a worker has something to do."""
        return worker in self._busy

    def _tell(self, trial: Trial) -> None:
        self._on_trial(trial)
        self._judge.raise_if_failing()

    def _take_up(self, orphans: Sequence[Asked]) -> Iterator[Trial]:
        """Have trials done again whose driver died; fail those that seem to kill it."""
        for asked in orphans:
            one = Underway(asked, self._judge, self._now)
            if asked.row.attempts < TRIES:
                self._again.append(one)
                continue
            error = RunError(f"the search died each of the {TRIES} times that it ran")
            yield self._finish(one, error=error)

    def _give_out(self) -> Reason | None:
        """Give idle workers something to do, until there is a reason not to."""
        for worker in self._crew.idle():
            busy = self.busy
            if ended := self.begin(worker):
                return ended
            if self.busy == busy:  # nothing for this one, so for none: until one ends
                return None
        return None

    def begin(self, worker: int) -> Reason | None:
        """Give a worker something to do, if there is; tell why no more is begun."""
        begun, waiting = self._begun(), bool(self._again)
        if waiting or begun != self._cleared:  # asked once for each trial
            if ended := self._ends.reason(begun, self._mean_s(), waiting=waiting):
                return ended
            # One that is begun again counts already: it clears no new one.
            self._cleared = -1 if waiting else begun
        if self._again:
            self._start(worker, self._once_more(self._again.pop(0)))
            return None
        proposal = self._next_proposal()
        if proposal is None:
            best = self._judge.incumbent
            refused = best is not self._latest
            self._survey.want(best, refused=refused, asked=begun)
            if job := self._survey.next_job():
                self._busy[worker] = (job, self._now())
                self._crew.submit(worker, job)
            if self._survey.busy:
                return None
        return self._ask(worker, proposal)

    def _ask(self, worker: int, proposal: Proposal | None) -> Reason | None:
        """Ask for a trial, and give it to a worker."""
        began = self._now()
        try:
            asked = self._asking.ask(proposal)
        except ExhaustedError as error:
            if self._busy:
                return None  # what is underway may lead on
            log.info("the search ends: %s", error)
            return "exhausted"
        one = Underway(asked, self._judge, self._now)
        one.timings["slopes_s"], self._slopes_s = self._slopes_s, 0.0
        one.timings["propose_s"] = self._now() - began
        self._start(worker, one)
        return None

    def _next_proposal(self) -> Proposal | None:
        while self._queue:
            proposal = self._queue.pop(0)
            if not self._asking.knows(proposal[1]):
                return proposal
        return None

    def _once_more(self, one: Underway) -> Underway:
        """Write that a trial is begun again that was cut short."""
        one.asked = self._asking.again(one.asked)
        return one

    def _start(self, worker: int, one: Underway) -> None:
        self._busy[worker] = one
        self._crew.submit(worker, one.begin())

    def _hear(self, outcome: Outcome) -> Trial | None:
        """Take in what came of a job; give the trial if it has ended by it."""
        work = self._busy.pop(outcome.worker)
        if isinstance(work, Underway):
            return self._advance(work, outcome)
        job, began = work
        if outcome.error is not None:
            raise outcome.error
        if outcome.lost:
            log.warning("a worker was lost while it took slopes: %s", outcome.lost)
            self._survey.give_back(job)
        else:
            self._slopes_s += self._now() - began
            self._survey.hear(job, outcome.result)
        return None

    def _advance(self, one: Underway, outcome: Outcome) -> Trial | None:
        """Go on with a trial: measure it further, or end it."""
        if outcome.lost:
            one.lose()
            log.warning("trial %d lost its worker: %s", one.number, outcome.lost)
            if one.deaths < DEATHS:
                self._again.append(one)
                return None
            lost = RunError(f"it cost {DEATHS} workers; the last: {outcome.lost}")
            return self._finish(one, error=lost)
        if outcome.error is not None:
            return self._finish(one, error=outcome.error)
        try:
            found = one.go_on(outcome.result)
        except Exception as error:
            return self._finish(one, error=error)
        if isinstance(found, tuple):
            return self._finish(one, *found)
        self._busy[outcome.worker] = one
        self._crew.submit(outcome.worker, found)
        return None

    def _finish(
        self,
        one: Underway,
        score: Score | None = None,
        whole: bool = False,
        *,
        error: Exception | None = None,
    ) -> Trial:
        """End a trial: have it on disk before the study learns of it."""
        self._judge.hear(one.number, error)
        row = one.row(self._objective, score or Score({}), whole=whole, error=error)
        trial = self._asking.tell(one.asked, row)
        insort(self._trials, trial, key=lambda trial: trial.number)
        self._latest = trial
        self._judge.consider(trial)
        self._walls.append(one.seconds)
        return trial

    def _begun(self) -> int:
        return len(self._trials) + self._asking.underway

    def _mean_s(self) -> float:
        """Give the mean time of a trial: of this run, else of those before it."""
        walls = self._walls or [sum(trial.timings.values()) for trial in self._trials]
        return math.fsum(walls) / len(walls) if walls else 0.0
