"""Our strategies as a searcher of Ray Tune, and our judge as one of its schedulers."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from autoprune.searching.crew import Crew, Measure, Outcome
from autoprune.searching.driving import POLL_S, Search
from autoprune.searching.ends import Reason
from autoprune.searching.ray_trials import TIME, VALUE, pack
from autoprune.searching.rows import Trial
from autoprune.searching.rungs import halving_factor, intermediate


class Relay(Crew):
    """A crew to which a search gives out what Tune shall measure.

    Attributes:
        numbers: New names for workers.
        given: What the search has given out, by worker.
    """

    numbers: Iterator[int]
    given: dict[int, Measure]

    @property
    @abstractmethod
    def limit(self) -> float:
        """Seconds that a measurement may take."""

    @abstractmethod
    def timed(self, seconds: float) -> None:
        """Take note of what a measurement took."""


class PolicySearcher(Searcher):
    """Asks our strategies for Tune, and has its results written to the ledger.

    Args:
        search: The search.
        crew: Takes what the search gives out.
    """

    def __init__(self, search: Search, crew: Relay) -> None:
        super().__init__()
        self._search = search
        self._crew = crew
        self._workers: dict[str, int] = {}
        self._heard: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self.reason: Reason | None = None
        self.error: Exception | None = None
        self.judges = not (search.rungs and search.pruner == "halving")

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Let Tune name its metric: the objective is ours."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Give the configuration of a trial; None to be asked again later."""
        try:
            return self._suggest(trial_id)
        except Exception as error:
            self.error = error
            return Searcher.FINISHED

    def _suggest(self, trial_id: str) -> Any:
        while self.error is None:
            self._hear_slopes(0.0)
            worker = next(self._crew.numbers)
            ended = self._search.begin(worker)
            job = self._crew.given.pop(worker, None)
            if job is not None:
                return self._config(trial_id, worker, job)
            if ended and not self._search.busy:
                self.reason = ended
                return Searcher.FINISHED
            if self._workers:
                return None
            self._hear_slopes(POLL_S)
        return Searcher.FINISHED

    def _config(self, trial_id: str, worker: int, job: Measure) -> dict[str, Any]:
        rung, rungs = self._search.rung_of(worker), self._search.rungs
        climbs = [*rungs[:-1], None] if rungs and rung is None else [job.windows]
        self._workers[trial_id], self._since[trial_id] = worker, time.monotonic()
        return {
            "policy": pack(job.policy),
            "near": pack(job.near) if job.near else None,
            "windows": climbs,
            "time_limit": self._crew.limit,
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take in what a trial scored at a rung."""
        self.goes_on(trial_id, result)

    def goes_on(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Take in a result, once; tell whether the trial is to climb on."""
        if trial_id not in self._workers:
            return False
        worker = self._workers[trial_id]
        steps = result["training_iteration"]
        if self._heard.get(trial_id) != steps:
            self._heard[trial_id], self._since[trial_id] = steps, time.monotonic()
            self._crew.timed(result["time_this_iter_s"])
            if self.judges or "error" in result or "refused" in result:
                self._tell(worker, result)
        if not self._search.has(worker):
            self._forget(trial_id)
            return False
        return True

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """End a trial, with what it scored last; its death is heard of elsewhere."""
        if error or not result or not self.goes_on(trial_id, result):
            return
        if self.error is not None:
            return  # all ends; the trial is begun again when the run goes on
        worker = self._workers[trial_id]
        score, rungs = result["score"], self._search.rungs
        whole = not rungs or len(score.windows) == rungs[-1]
        self._guarded(lambda: self._search.end(worker, score, whole=whole))
        self._forget(trial_id)

    def lose(self, trial_id: str, why: str) -> None:
        """Hear that a trial's actor is gone."""
        if trial_id not in self._workers:
            return
        worker, limit = self._workers[trial_id], self._crew.limit
        if time.monotonic() - self._since[trial_id] >= limit:
            why = f"no answer in {limit:.0f} s; stopped"
        self._guarded(lambda: self._search.hear(Outcome(worker, lost=why)))
        self._forget(trial_id)

    def _tell(self, worker: int, result: Mapping[str, Any]) -> None:
        if "refused" in result:
            self.error = result["refused"]
            return
        outcome = Outcome(worker, result.get("score"), result.get("error"))
        self._guarded(lambda: self._search.hear(outcome))

    def _guarded(self, act: Callable[[], None]) -> None:
        """Do something; what it raises ends the experiment, and then the run."""
        try:
            act()
        except Exception as error:
            self.error = self.error or error

    def _forget(self, trial_id: str) -> None:
        worker = self._workers.pop(trial_id)
        self._heard.pop(trial_id, None)
        self._since.pop(trial_id)
        self._crew.given.pop(worker, None)

    def _hear_slopes(self, seconds: float) -> None:
        for outcome in self._crew.wait(seconds):
            self._search.hear(outcome)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the ledger has all."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing: a searcher is made from the ledger."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave all out of what Tune saves: it is never restored from that."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "PolicySearcher":
        return self


class RungScheduler(FIFOScheduler):
    """Has our judge say, at every rung, whether a trial is measured further.

    Args:
        searcher: Whose judge.
    """

    def __init__(self, searcher: PolicySearcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._searcher = searcher

    def on_trial_result(
        self, tune_controller: Any, trial: Any, result: dict[str, Any]
    ) -> str:
        """Decide; called by Tune."""
        climbs = self._searcher.goes_on(trial.trial_id, result)
        return str(TrialScheduler.CONTINUE if climbs else TrialScheduler.STOP)


def scheduler_of(search: Search, searcher: PolicySearcher) -> TrialScheduler:
    """Make what ends trials at rungs: Tune's ASHA for ``halving``, else our judge."""
    if searcher.judges:
        return RungScheduler(searcher)
    return halving(search.rungs, search.history)


def halving(rungs: Sequence[int], history: Sequence[Trial]) -> TrialScheduler:
    """Make Tune's ASHA on our rungs, which knows the trials that the ledger has."""
    asha: Any = ASHAScheduler(
        time_attr=TIME,
        metric=VALUE,
        mode="min",
        grace_period=rungs[0],
        max_t=rungs[-1],
        reduction_factor=halving_factor(rungs),
    )
    for row in history:
        known: Any = SimpleNamespace(trial_id=f"row {row.number}")
        asha.on_trial_add(None, known)
        for seen, value in intermediate("halving", row, rungs).items():
            asha.on_trial_result(None, known, {TIME: seen, VALUE: value})
    return cast(TrialScheduler, asha)
