"""How a run searches, for how long, and who evaluates for it."""

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from autoprune.limits import STRICT, parse_bytes, parse_duration, seconds_until

Bytes = Annotated[float, BeforeValidator(parse_bytes)]
"""Bytes, written such as ``16 GB``."""

Duration = Annotated[float, BeforeValidator(parse_duration)]
"""Seconds, written such as ``8h``."""


class Part(BaseModel):
    """A part of a configuration: frozen, and strict about its keys."""

    model_config = STRICT


Rival = Literal["allocation", "quantization", "pruning", "random"]


class SearchConfig(Part):
    """How the space is explored, and for how long.

    Attributes:
        sampler: Name of a strategy; by default ``gradient`` for the KL within budgets,
            else ``nsga2``.
        trials: Most trials of a round, resumed ones included.
        budget: Most time in seconds, written such as ``8h``: for all of a run, the last
            choice, refining and the export included.
        deadline: When a run has to have ended, in place of a budget: ``07:30``, or
            ``2026-12-01 07:30``.
        disk: Most bytes that variants may take on the disk, written such as ``50 GB``;
            by default 20 GB, or ``AUTOPRUNE_STORE_GB``.
        memory: Most bytes of memory for all processes of the run, ``16 GB``; workers
            that would not fit are refused, and none gets more than its share.
        seed: Of everything random.
        sensitivity: What a choice costs by itself, for strategies that ask: ``error``
            of outputs, ``fisher`` from the dense model's gradients, ``blend`` from
            them by windows and by single outputs, or ``measured``. Rivals are solved
            for by both ``fisher`` and ``blend`` where one of them is asked for.
        finalists: How many of the best are compared on split C.
        rounds: How often the space is searched: each further round with a bank on the
            inputs of the incumbent, and levels at half the step around it.
        rungs: Tokens of the fitness split at which a trial may end; none by default.
        proposals: Formulas whose policies are tried after the uniform ones, such as
            ``owl`` or ``lamp``; none by default, as each costs a trial.
        rivals: What the winner has to beat beside the uniform policies: the best policy
            by what choices cost by themselves (``allocation``), also of those that only
            quantize (``quantization``) or only prune (``pruning``), a trial each; and
            the best of a ``random`` search as long as the search itself.
        refine: What becomes of the winner: ``solve`` makes its variants anew, block by
            block, on its own inputs, and keeps what is better on split C; ``mix`` also
            tries the better of the two at every site; ``none`` leaves it as it is.
        pruner: What ends it there: ``race`` gives up what is worse than the incumbent
            on the same windows, ``halving`` and ``wilcoxon`` are Optuna's.
    """

    sampler: str | None = None
    trials: int | None = Field(None, ge=1)
    budget: Duration | None = None
    deadline: str | None = None
    disk: Bytes | None = None
    memory: Bytes | None = None
    seed: int = Field(0, ge=0)
    sensitivity: Literal["error", "fisher", "blend", "measured"] = "fisher"
    finalists: int = Field(4, ge=1)
    rounds: int = Field(1, ge=1, le=8)
    rungs: list[Annotated[int, Field(ge=1)]] = []
    proposals: list[str] = []
    rivals: list[Rival] = ["allocation", "quantization", "pruning"]
    refine: Literal["mix", "solve", "none"] = "mix"
    pruner: Literal["race", "halving", "wilcoxon", "none"] = "race"

    @property
    def asked(self) -> dict[str, list[str]]:
        """The settings of the policies to try first, where they are no defaults."""
        fields = type(self).model_fields
        found = {"proposals": self.proposals, "rivals": list[str](self.rivals)}
        return {n: value for n, value in found.items() if value != fields[n].default}

    def seconds(self, now: datetime) -> float | None:
        """Tell how long a run may take that begins now; None for no limit.

        Raises:
            ConfigError: If the deadline is no time, or has passed.
        """
        return seconds_until(self.deadline, now) if self.deadline else self.budget

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.trials is None and self.budget is None and self.deadline is None:
            raise ValueError(
                "a search needs an end: give trials, a time budget or a deadline"
            )
        if self.budget is not None and self.deadline is not None:
            raise ValueError("give a time budget or a deadline, not both")
        if self.sampler == "random" and "random" in self.rivals:
            raise ValueError(
                "sampler random cannot have rival random; take one of the two away"
            )
        return self


class RecoveryConfig(Part):
    """How finalists get their quality back by training, as a search of its own.

    Attributes:
        schedules: Courses to choose from: ``iterative(rounds=[2, 4]) +
            distill(tokens=65536)``; a list in a parameter stands for a choice.
        candidates: How many of the finalists are tried with them, the best first.
        trials: Most courses that are carried out; all of them by default.
        short: Share of a course's tokens after which the worse are given up; 1 for
            none. The others are trained from the start.
        share: Of the time of the run, what is kept for all this.
        price: What a million tokens of training cost, in the unit of the objective.
    """

    schedules: list[str] = Field(min_length=1)
    candidates: int = Field(2, ge=1)
    trials: int | None = Field(None, ge=1)
    short: float = Field(0.25, gt=0, le=1)
    share: float = Field(0.4, gt=0, lt=1)
    price: float = Field(0.0, ge=0)


class WorkersConfig(Part):
    """Who evaluates. Any of it may change when a run goes on.

    Attributes:
        engine: What evaluators run in: ``process`` for processes on this machine,
            ``ray`` for actors on a Ray cluster, ``ray-tune`` for trials of Ray Tune.
        count: How many. By default, this process evaluates by itself, one trial after
            the other; with Ray, as many as the cluster has room for.
        threads: Of each; by default the processors are shared out, and on a cluster one
            for each processor that an evaluator asks for.
        time_limit: Most time that one may take for one measurement before it
            counts as hanging; by default twenty times the longest so far, and ten
            minutes at the least.
        address: The Ray cluster: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``; by
            default one on this machine, for this run.
        cpus: Processors that each evaluator asks Ray for; by default its threads.
        gpus: GPUs that each asks for: a share of one, or whole ones.
    """

    engine: Literal["process", "ray", "ray-tune"] = "process"
    count: int | None = Field(None, ge=1, le=1024)
    threads: int | None = Field(None, ge=1)
    time_limit: Duration | None = None
    address: str | None = Field(None, min_length=1)
    cpus: float | None = Field(None, gt=0)
    gpus: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _of_ray(self) -> Self:
        given = [n for n in ("address", "cpus", "gpus") if getattr(self, n)]
        if given and self.engine == "process":
            raise ValueError(
                f"{' and '.join(given)} belongs to Ray; add engine: ray, or ray-tune"
            )
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(
                f"an evaluator gets a share of one GPU or whole ones, found gpus: "
                f"{self.gpus:g}; give a whole number, or less than 1"
            )
        if self.engine == "ray-tune" and (self.address or "").startswith("ray://"):
            raise ValueError(
                "ray-tune drives from this machine, which an address of ray:// does "
                "not allow; give auto or HOST:PORT, or take engine: ray"
            )
        return self
