"""Who evaluates: a crew of workers that take jobs, in this process or in others.

A job is plain data, so that it reaches a worker anywhere; what a worker needs beside it
(model, tokens, variants) it loads by itself, once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from autoprune.compression.shares import Share
from autoprune.policy import Policy
from autoprune.searching.costings import Costing
from autoprune.searching.ends import Reason
from autoprune.searching.plan import Plan
from autoprune.searching.trial import Evaluator

if TYPE_CHECKING:
    from autoprune.searching.driving import Search


class Job(ABC):
    """Something that an evaluator does, as plain data."""

    timed: ClassVar[bool] = True
    """Whether who takes much longer than others counts as hanging."""

    @abstractmethod
    def run(self, evaluator: Evaluator) -> Any:
        """Do it, and give the result; what it raises is the job's error."""


@dataclass(frozen=True, eq=False)
class Measure(Job):
    """Measure a policy; see ``Evaluator.measure``."""

    policy: Policy
    windows: int | None = None
    near: Policy | None = None

    def run(self, evaluator: Evaluator) -> Any:
        """Give the ``Score``."""
        return evaluator.measure(self.policy, self.windows, near=self.near)


@dataclass(frozen=True, eq=False)
class TakeSlopes(Job):
    """Take a share of the slopes at a policy; see ``Evaluator.slopes``."""

    policy: Policy
    tokens: int
    draws: int
    turn: int
    drawn_tokens: int | None = None
    beside: Sequence[int] = ()
    part: tuple[int, int] = (0, 1)

    def run(self, evaluator: Evaluator) -> Any:
        """Give the ``SiteSlopes``."""
        return evaluator.slopes(
            self.policy,
            tokens=self.tokens,
            draws=self.draws,
            turn=self.turn,
            drawn_tokens=self.drawn_tokens,
            beside=self.beside,
            part=self.part,
        )


@dataclass(frozen=True, eq=False)
class MakeVariants(Job):
    """Make the variants of some blocks; see ``Evaluator.make``."""

    share: Share
    timed: ClassVar[bool] = False

    def run(self, evaluator: Evaluator) -> Any:
        """Tell how many were made."""
        return evaluator.make(self.share)


@dataclass(frozen=True, eq=False)
class MeasureCosts(Job):
    """Measure what choices cost, or a share of that; see ``Evaluator.costs``."""

    costing: Costing
    timed: ClassVar[bool] = False

    def run(self, evaluator: Evaluator) -> Any:
        """Give the ``Costs``."""
        return evaluator.costs(self.costing)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a job.

    Attributes:
        worker: Who had it.
        result: What it gave.
        error: What it raised; None if it was done.
        lost: Why the worker died or was stopped in the middle of it; empty if it was
            not. Another worker takes its place by itself.
    """

    worker: int
    result: Any = None
    error: Exception | None = None
    lost: str = ""


class Crew(ABC):
    """Workers that evaluate. Close it, or use it as a context, to end them."""

    size: int
    """Workers that it has when all are there."""

    @property
    def loading(self) -> bool:
        """Whether workers that are not idle yet will be, unless they die."""
        return False

    @abstractmethod
    def enter(self, plan: Plan) -> None:
        """Evaluate for another part of the run from now on; no worker may be busy."""

    @abstractmethod
    def idle(self) -> list[int]:
        """Name the workers that can take a job now.

        Raises:
            RunError: If workers cannot be had.
        """

    @abstractmethod
    def submit(self, worker: int, job: Job) -> None:
        """Give an idle worker a job."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Outcome]:
        """Wait until jobs have ended or workers are idle, or the seconds have passed.

        Raises:
            RunError: If workers cannot be had.
        """

    def drive(self, search: "Search") -> Reason:
        """Have a search done to its end; tell why it ended."""
        return search.run()

    def recall(self) -> None:  # noqa: B027 not every crew can lack a worker
        """Have no worker do anything: what was submitted is let go."""

    def close(self) -> None:  # noqa: B027 not every crew has something to end
        """End the workers. Doing so twice does no harm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


@dataclass(eq=False)
class LocalCrew(Crew):
    """One evaluator in this process, which does its job while it is waited for."""

    evaluator: Evaluator
    size: int = 1
    _job: list[Job] = field(default_factory=list)

    def enter(self, plan: Plan) -> None:
        """Evaluate for another part of the run."""
        self.evaluator = plan.evaluator()

    def idle(self) -> list[int]:
        """Name the evaluator, unless it has a job."""
        return [] if self._job else [0]

    def submit(self, worker: int, job: Job) -> None:
        """Keep the job."""
        self._job.append(job)

    def wait(self, seconds: float) -> list[Outcome]:
        """Do the job."""
        if not self._job:
            return []
        try:
            return [Outcome(0, self._job.pop().run(self.evaluator))]
        except Exception as error:
            return [Outcome(0, error=error)]
