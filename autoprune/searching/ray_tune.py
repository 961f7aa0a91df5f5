"""The search through Ray Tune, for those whose pipelines live there.

Our strategies ask behind a searcher of Tune, and our evaluators measure in a trainable.
The ledger stays the truth: every run is a new experiment of Tune, told of nothing that
is finished, so that a snapshot of Tune that is behind can cost nothing.
"""

import itertools
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from autoprune.errors import RunError
from autoprune.search_config import WorkersConfig
from autoprune.searching.crew import Job, Measure, Outcome
from autoprune.searching.driving import Search
from autoprune.searching.ends import Reason
from autoprune.searching.plan import Plan
from autoprune.searching.ray_cluster import Cluster
from autoprune.searching.ray_engine import RayCrew
from autoprune.searching.ray_searcher import PolicySearcher, Relay, scheduler_of
from autoprune.searching.ray_trials import PolicyTrainable
from autoprune.searching.ray_watch import Enough, Watch, watched
from autoprune.searching.recipe import Recipe
from autoprune.searching.remote import RemoteEvaluator
from autoprune.searching.workers import PATIENCE, PATIENCE_S

FOLDER = "tune"
"""In the run folder: what Tune keeps of its experiments."""

_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the other one prints whatever it is told
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # three more files for every trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours to hear
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # an error is a result without metrics
}


class TunedCrew(Relay):
    """Has a search done by a ``Tuner``: trials of Tune measure, its loop drives.

    Slopes are no trials. They are taken by an actor of its own, beside Tune's.

    Args:
        recipe: What is evaluated for.
        cluster: Where; closed with the crew.
        folder: The run folder.
        asked: What the user asked for.
        cpus: That each evaluator asks for.
        beside: Evaluators that take slopes, one or none.
        evaluator: What makes evaluators.
    """

    size = 1  # of those who take slopes

    def __init__(
        self,
        recipe: Recipe,
        cluster: Cluster,
        folder: Path,
        *,
        asked: WorkersConfig,
        cpus: float,
        beside: int,
        evaluator: type[RemoteEvaluator] = RemoteEvaluator,
    ) -> None:
        self._recipe = recipe
        self._cluster = cluster
        self._folder = folder.absolute() / FOLDER
        self._asked = asked
        self._cpus = cpus
        self._beside = beside
        self._evaluator = evaluator
        self._longest = 0.0
        self._surveyor: RayCrew | None = None
        self._waiting: list[tuple[int, Job]] = []
        self._taking: dict[int, int] = {}
        self.numbers: Iterator[int] = itertools.count()
        self.given: dict[int, Measure] = {}

    @property
    def limit(self) -> float:
        """Seconds that a measurement may take."""
        if self._asked.time_limit is not None:
            return self._asked.time_limit
        return max(PATIENCE_S, PATIENCE * self._longest)

    def timed(self, seconds: float) -> None:
        """Take note of what a measurement took."""
        self._longest = max(self._longest, seconds)

    def enter(self, plan: Plan) -> None:
        """Evaluate for another part of the run."""
        self._recipe = self._recipe.around(plan)
        if self._surveyor is not None:
            self._surveyor.enter(plan)

    def idle(self) -> list[int]:
        """Name nobody: it is Tune that asks for trials."""
        return []

    def submit(self, worker: int, job: Job) -> None:
        """Keep a measurement for Tune, and have slopes taken."""
        if isinstance(job, Measure):
            self._recipe.put_mark()  # a new actor may take it
            self.given[worker] = job
        else:
            self._waiting.append((worker, job))

    def wait(self, seconds: float) -> list[Outcome]:
        """Wait for slopes, if some are being taken.

        Raises:
            RunError: If the cluster has no place for who takes them.
        """
        if not self._waiting and not self._taking:
            time.sleep(seconds)
            return []
        self._surveyor = self._surveyor or self._crew_of_one()
        for number in self._surveyor.idle():
            if self._waiting:
                self._taking[number], job = self._waiting.pop(0)
                self._surveyor.submit(number, job)
        heard = self._surveyor.wait(seconds)
        return [replace(one, worker=self._taking.pop(one.worker)) for one in heard]

    def drive(self, search: Search) -> Reason:
        """Have a search done to its end by Tune; tell why it ended.

        Raises:
            RunError: If the cluster has no place for a trial.
            Exception: What the search raised.
        """
        searcher = PolicySearcher(search, self)
        places = self._places()
        failed: Exception | None = None
        with _environment(_SETTINGS), watched(self._cluster):
            try:
                self._tuner(search, searcher, places).fit()
            except Exception as error:
                failed = error
        if searcher.error is not None:
            raise searcher.error
        if searcher.reason is None:
            raise RunError(
                f"Ray Tune ended before the search did{': ' if failed else ''}"
                f"{failed or ''}. No finished trial is lost; the same command goes on"
            ) from failed
        return searcher.reason

    def close(self) -> None:
        """End who takes slopes, and leave the cluster."""
        if self._surveyor is not None:
            self._surveyor.close()
        self._cluster.close()

    def _crew_of_one(self) -> RayCrew:
        return RayCrew(
            self._recipe,
            self._cluster,
            count=1,
            cpus=self._cpus,
            gpus=self._asked.gpus,
            time_limit=self._asked.time_limit,
            evaluator=self._evaluator,
        )

    def _places(self) -> int:
        """Tell how many trials run side by side."""
        found = self._cluster.room(self._cpus, self._asked.gpus) or 0
        room = found - self._beside
        if room < 1:
            slopes = " and one more that takes slopes" if self._beside else ""
            raise RunError(
                f"{self._cluster.name} has no room for an evaluator{slopes}: each asks "
                f"for {self._cpus:g} CPUs and {self._asked.gpus:g} GPUs, and the nodes "
                f"have {self._cluster.resources()} in all. Add nodes, ask for less "
                "under workers: {cpus: ..., gpus: ...}, or take engine ray"
            )
        return min(room, self._asked.count or room)

    def _tuner(self, search: Search, searcher: PolicySearcher, places: int) -> Any:
        class Trainable(PolicyTrainable):
            recipe = self._recipe
            evaluator = self._evaluator

        resources = {"cpu": self._cpus, "gpu": self._asked.gpus}
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{uuid.uuid4().hex[:6]}"
        watch = Watch(searcher, self._cluster)
        return tune.Tuner(
            tune.with_resources(Trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler_of(search, searcher),
                num_samples=-1,
                max_concurrent_trials=places,
                reuse_actors=True,
                trial_name_creator=_name_of,
                trial_dirname_creator=_name_of,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(self._folder),
                callbacks=[watch],
                stop=Enough(searcher),
                failure_config=tune.FailureConfig(max_failures=0),
                verbose=0,
            ),
        )


def _name_of(trial: Any) -> str:
    return str(trial.trial_id)


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
