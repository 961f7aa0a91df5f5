"""Evaluators on a Ray cluster: actors that keep their model from trial to trial.

The driver has study and ledger; a policy goes out, and what it scored comes back. What
kills an actor, or the whole node under it, costs a trial at most.
"""

import logging
import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from autoprune.errors import RunError
from autoprune.searching.crew import Crew, Job, Outcome
from autoprune.searching.fingerprint import differences
from autoprune.searching.plan import Plan
from autoprune.searching.ray_causes import NODE, cause_of
from autoprune.searching.ray_cluster import Cluster
from autoprune.searching.recipe import Recipe
from autoprune.searching.remote import RemoteEvaluator
from autoprune.searching.worker import Done, Ready, Refused
from autoprune.searching.workers import PATIENCE, PATIENCE_S, STARTS

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""Seconds after which the driver looks again what the cluster has room for."""

LOAD_S = 3600.0
"""Time that an evaluator has to load what it needs."""

PLACE_S = 300.0
"""Time that a run goes on while the cluster has room for no evaluator at all."""


@dataclass(eq=False)
class _Actor:
    """An evaluator, and what it does.

    Attributes:
        handle: Ray's.
        state: Whether it waits for a place, loads what it needs, or takes jobs; one
            that has refused the run keeps its place, so that no other one gets it.
        call: The call that is under way.
        recipe: What it evaluates for.
        job: What it measures.
        since: When it began to, or to load.
        where: Its process.
    """

    handle: Any
    state: Literal["waiting", "loading", "ready", "refused"]
    call: Any
    recipe: Recipe | None = None
    job: Job | None = None
    since: float = 0.0
    where: str = "an actor without a place yet"


class RayCrew(Crew):
    """Evaluators in actors of Ray, begun again elsewhere when they are lost.

    Args:
        recipe: What they evaluate for.
        cluster: Where they are; closed with the crew.
        count: How many; None for as many as the cluster has room for, also as it grows.
        cpus: That each asks for.
        gpus: That each asks for.
        time_limit: Seconds that a job may take; None for twenty times the longest so
            far, and ten minutes at the least.
        evaluator: What runs in the actors.
        patience: Seconds that the crew may have no evaluator with a place.
    """

    def __init__(
        self,
        recipe: Recipe,
        cluster: Cluster,
        *,
        count: int | None,
        cpus: float,
        gpus: float = 0.0,
        time_limit: float | None = None,
        evaluator: type[RemoteEvaluator] = RemoteEvaluator,
        patience: float = PLACE_S,
    ) -> None:
        self._recipe = recipe
        self._cluster = cluster
        self._count = count
        self._asked = (cpus, gpus)
        self._time_limit = time_limit
        self._patience = patience
        self._class: Any = ray.remote(evaluator).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )
        self._actors: dict[int, _Actor] = {}
        self._longest = 0.0
        self._deaths = 0
        self._served = False
        self._placed = time.monotonic()
        self._looked = float("-inf")
        self._look()

    @property
    def size(self) -> int:  # type: ignore[override]
        """Evaluators that are asked for now."""
        return max(1, len(self._actors))

    def enter(self, plan: Plan) -> None:
        """Have all evaluate for another part of the run; none may be busy."""
        recipe = self._recipe.around(plan)
        if not differences(self._recipe.fingerprint, recipe.fingerprint):
            return
        self._recipe = recipe
        for actor in self._actors.values():
            if actor.state == "ready":
                self._load(actor)

    def idle(self) -> list[int]:
        """Name the evaluators that have loaded all they need and have no job."""
        return [
            number
            for number, actor in self._actors.items()
            if actor.state == "ready" and actor.call is None
        ]

    @property
    def loading(self) -> bool:
        """Whether evaluators that have a place load what they need."""
        return any(actor.state == "loading" for actor in self._actors.values())

    def submit(self, worker: int, job: Job) -> None:
        """Send a job. If the actor is gone, that is told by ``wait``."""
        actor = self._actors[worker]
        actor.job, actor.since = job, time.monotonic()
        actor.call = actor.handle.do.remote(job)

    def wait(self, seconds: float) -> list[Outcome]:
        """Wait for evaluators; replace those that are lost or hang.

        Raises:
            RunError: If the cluster is gone, has no place for any for long, or they
                die or refuse the run before any was ready.
        """
        self._look()
        calls = {a.call: n for n, a in self._actors.items() if a.call is not None}
        if not calls:
            time.sleep(min(seconds, self._left()))
        heard = self._ended(list(calls), min(seconds, self._left())) if calls else []
        outcomes = [self._hear(calls[call]) for call in heard]
        outcomes += [self._stop_hanging(number) for number in self._hanging()]
        return [outcome for outcome in outcomes if outcome is not None]

    def recall(self) -> None:
        """End the evaluators that have a job; others are asked for in their place."""
        for number in [n for n, one in self._actors.items() if one.job]:
            _kill(self._actors.pop(number))
        self._looked = float("-inf")

    def close(self) -> None:
        """End all evaluators, and leave the cluster."""
        for actor in self._actors.values():
            _kill(actor)
        self._actors.clear()
        self._cluster.close()

    def _look(self) -> None:
        """Ask for evaluators, now and then, as many as there shall be."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        room = self._cluster.room(*self._asked)
        self._looked = time.monotonic()
        if room is None:
            return
        wanted = room if self._count is None else self._count
        for number in range(wanted):
            if len(self._actors) < wanted and number not in self._actors:
                self._actors[number] = self._begin()
        states = {actor.state for actor in self._actors.values()}
        if states & {"loading", "ready"}:
            self._placed = self._looked
        elif self._looked - self._placed > self._patience:
            cpus, gpus = self._asked
            raise RunError(
                f"{self._cluster.name} had no place for an evaluator in "
                f"{self._patience:.0f} s: each asks for {cpus:g} CPUs and {gpus:g} "
                f"GPUs, and the nodes have {self._cluster.resources()} in all. Add "
                "nodes, or ask for less under workers: {cpus: ..., gpus: ...}"
            )

    def _begin(self) -> _Actor:
        handle = self._class.remote()
        return _Actor(handle, "waiting", handle.where.remote())

    def _load(self, actor: _Actor) -> None:
        self._recipe.put_mark()
        actor.state, actor.recipe = "loading", self._recipe
        actor.since = time.monotonic()
        actor.call = actor.handle.prepare.remote(self._recipe)

    def _ended(self, calls: list[Any], seconds: float) -> list[Any]:
        """Wait for a call to end; give all that have."""
        try:
            ended, _ = ray.wait(calls, num_returns=1, timeout=seconds)
            if ended and len(calls) > 1:
                ended, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        except (ConnectionError, RayError) as error:
            raise RunError(
                f"{self._cluster.name} is gone: {error}. No finished trial is lost; "
                "the same command goes on"
            ) from error
        return list(ended)

    def _hear(self, number: int) -> Outcome | None:
        """Take in what an evaluator says, or that it is gone."""
        actor = self._actors[number]
        try:
            said = ray.get(actor.call)
        except (ConnectionError, RayError) as error:
            return self._lose(number, cause_of(error), error)
        actor.call = None
        if isinstance(said, Refused):
            self._refuse(actor, said.error)
        elif isinstance(said, Ready):
            actor.state, self._deaths, self._served = "ready", 0, True
        elif isinstance(said, Done):
            if actor.job and actor.job.timed:
                took = time.monotonic() - actor.since
                self._longest = max(self._longest, took)
            actor.job = None
            return Outcome(number, said.result, said.error)
        else:
            actor.where = said
            self._placed = time.monotonic()
        if actor.state != "refused" and actor.recipe is not self._recipe:
            self._load(actor)
        return None

    def _refuse(self, actor: _Actor, error: Exception) -> None:
        """Do without an evaluator that would measure something else."""
        actor.state = "refused"
        others = [one for one in self._actors.values() if one.state != "refused"]
        if not self._served or not others:
            raise error
        log.warning("%s is not used: %s", actor.where, error)

    def _lose(self, number: int, why: str, error: Exception) -> Outcome | None:
        """Ask for another evaluator in place of one; tell of the job it had."""
        gone = self._actors.pop(number)
        _kill(gone)
        if gone.state == "ready":
            self._looked = float("-inf")  # at once, if there is room
        elif NODE not in why:
            self._deaths += 1
            served = any(one.state == "ready" for one in self._actors.values())
            if self._deaths >= STARTS and not served:
                raise RunError(
                    f"evaluators died {STARTS} times before one was ready; the last, "
                    f"{gone.where}: {why}. Ray's logs on its node say more; fewer "
                    "evaluators need less memory"
                ) from error
        return Outcome(number, lost=f"{gone.where}: {why}") if gone.job else None

    def _limit(self, actor: _Actor) -> float:
        """Tell the seconds that what an evaluator does may take."""
        if actor.state == "loading":
            return LOAD_S
        if actor.job is None or not actor.job.timed:
            return math.inf
        if self._time_limit is not None:
            return self._time_limit
        return max(PATIENCE_S, PATIENCE * self._longest)

    def _left(self) -> float:
        """Tell how long it is until a limit is passed, or it is time to look."""
        limits = [one.since + self._limit(one) for one in self._actors.values()]
        until = min([self._looked + LOOK_S, *limits])
        return max(0.0, until - time.monotonic())

    def _hanging(self) -> list[int]:
        now = time.monotonic()
        actors = self._actors.items()
        return [n for n, one in actors if one.since + self._limit(one) <= now]

    def _stop_hanging(self, number: int) -> Outcome | None:
        why = f"no answer in {self._limit(self._actors[number]):.0f} s; stopped"
        return self._lose(number, why, TimeoutError(why))


def _kill(actor: _Actor) -> None:
    """End an actor, whatever it does."""
    try:
        ray.kill(actor.handle)
    except (ConnectionError, ValueError, RayError):
        pass  # it is gone, or the cluster is
