"""The Optuna study of a run: ask, evaluate, write, tell; rebuilt from the ledger."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from autoprune.errors import RunError
from autoprune.policy import Policy
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import WORST, Measurement, Objective
from autoprune.searching.problem import Problem
from autoprune.searching.rows import State, Trial, utc_now
from autoprune.searching.samplers import (
    BudgetedSampler,
    ExhaustedError,
    SamplerFactory,
    derive_seed,
)

log = logging.getLogger(__name__)

Evaluate = Callable[[Policy], Measurement]

Proposal = tuple[str, Policy]
"""A policy to try first, after the name of its origin."""

FAILURES = 3
"""Trials that may fail in a row; then the error is no accident of one policy."""

Reason = Literal["trials", "time", "stopped", "exhausted"]
"""Why a search ended: enough trials, no time for another, told to, nothing new left."""


def run_study(
    problem: Problem,
    evaluate: Evaluate,
    *,
    ledger: Ledger,
    sampler: SamplerFactory,
    objective: Objective,
    seed: int,
    trials: int | None = None,
    deadline: float | None = None,
    proposals: Sequence[Proposal] = (),
    on_trial: Callable[[Trial], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Reason:
    """Search, from where the ledger stands, until there is a reason to end.

    Args:
        problem: What may be chosen, its prices and budgets.
        evaluate: Measures a policy. Called once for each; what it raises fails the
            trial, and the search goes on.
        ledger: Open for writing.
        sampler: The strategy.
        objective: What is wanted.
        seed: Of everything random; equal seed and measurements, equal policies.
        trials: Most trials in the ledger, those of before included; None for no end.
        deadline: No trial is begun that on the average would end after this moment of
            ``time.monotonic``; None for no end.
        proposals: Policies to try first. One that the ledger has, or that is over a
            budget, is left out.
        on_trial: Called after the row of a trial is on disk.
        stop: Asked between trials.

    Returns:
        Why it ended. The trials stand in the ledger.

    Raises:
        ConfigError: If a goal or limit is not among the metrics.
        BudgetError: If no policy of the space is within the budgets.
        PolicyError: If a proposal does not fit the space.
        RunError: If the ledger cannot be written.
        Exception: Whatever ``evaluate`` raised in ``FAILURES`` trials in a row.
    """
    search = _Search(problem, objective, ledger, sampler, seed)
    queue = _admitted(problem, proposals)
    while True:
        while queue and search.knows(queue[0][1]):
            queue.pop(0)
        if trials is not None and len(search.trials) >= trials:
            return "trials"
        if stop is not None and stop():
            return "stopped"
        if deadline is not None and time.monotonic() + search.mean_s() > deadline:
            return "time"
        try:
            trial = search.step(evaluate, queue.pop(0) if queue else None)
        except ExhaustedError as error:
            log.info("the search ends: %s", error)
            return "exhausted"
        if on_trial is not None:
            on_trial(trial)
        search.raise_if_failing()


class _Search:
    """A study in memory beside the ledger that it was rebuilt from."""

    def __init__(
        self,
        problem: Problem,
        objective: Objective,
        ledger: Ledger,
        factory: SamplerFactory,
        seed: int,
    ) -> None:
        self.trials = ledger.trials()
        self._problem = problem
        self._objective = objective
        self._ledger = ledger
        self._factory = factory
        self._seed = seed
        self._known = {trial.policy.fingerprint for trial in self.trials}
        self._distributions: dict[str, BaseDistribution] = {
            **problem.space.distributions()
        }
        self._failed: list[Exception] = []
        self._walls: list[float] = []
        # Optuna tells of every study and trial; the run has its own voice.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sampler = BudgetedSampler(
            problem,
            factory,
            seed=seed,
            objectives=len(objective.goals),
            spread=_spread(problem, objective),
        )
        self._storage = optuna.storages.InMemoryStorage()
        self._study = optuna.create_study(
            storage=self._storage,
            sampler=self._sampler,
            directions=objective.directions,
        )
        self._study_id = self._storage.get_study_id_from_name(self._study.study_name)
        self._replay()

    def knows(self, policy: Policy) -> bool:
        """Tell whether a policy stands in the ledger."""
        return policy.fingerprint in self._known

    def mean_s(self) -> float:
        """Give the mean time of a trial: of this run, else of those before it."""
        walls = self._walls or [sum(trial.timings.values()) for trial in self.trials]
        return math.fsum(walls) / len(walls) if walls else 0.0

    def raise_if_failing(self) -> None:
        """Raise the last error if the last trials all failed."""
        if len(self._failed) >= FAILURES:
            raise self._failed[-1]

    def step(self, evaluate: Evaluate, proposal: Proposal | None) -> Trial:
        """Do one trial, and have it on disk before the study learns of it."""
        began, started = time.monotonic(), utc_now()
        asked, policy = self._ask(proposal[1] if proposal else None)
        proposed = time.monotonic()
        metrics, error = self._measure(evaluate, policy)
        evaluated = time.monotonic()
        state, values = self._judge(metrics, error)
        limits = self._objective.limits if error is None else ()
        constraints = {limit.metric: limit.excess(metrics) for limit in limits}
        for name, excess in constraints.items():
            asked.set_constraint(name, excess)
        trial = Trial(
            number=asked.number,
            state=state,
            origin=proposal[0] if proposal else self._factory.name,
            policy=policy,
            params=asked.params,
            seed=derive_seed(self._seed, asked.number),
            started=started,
            finished=utc_now(),
            values=values,
            metrics=metrics,
            constraints=constraints,
            timings={
                "propose_s": proposed - began,
                "evaluate_s": evaluated - proposed,
            },
            system_attrs=self._trial_attrs(asked.number),
            error=f"{type(error).__name__}: {error}" if error else None,
        )
        self._record(trial)
        self._walls.append(time.monotonic() - began)
        return trial

    def _ask(self, given: Policy | None) -> tuple[optuna.Trial, Policy]:
        if given is not None:
            self._sampler.give(self._problem.space.params(given))
        asked = self._study.ask(self._distributions)
        policy = self._problem.space.policy(asked.params)
        if self.knows(policy):  # a space without any choice: Optuna asks no sampler
            raise ExhaustedError(f"the only policy of the space is measured: {policy}")
        return asked, policy

    def _measure(
        self, evaluate: Evaluate, policy: Policy
    ) -> tuple[dict[str, float], Exception | None]:
        try:
            metrics = {name: float(value) for name, value in evaluate(policy).items()}
        except Exception as error:
            log.warning("trial %d failed: %s", len(self.trials), error, exc_info=True)
            self._failed.append(error)
            return {}, error
        self._failed.clear()
        return metrics, None

    def _judge(
        self, metrics: Measurement, error: Exception | None
    ) -> tuple[State, tuple[float, ...]]:
        """Tell how a trial ended, and what the study shall learn of it."""
        if error is not None:
            return "failed", ()
        values = self._objective.values(metrics)
        if all(math.isfinite(value) for value in metrics.values()):
            return "complete", values
        told = [
            value if math.isfinite(value) else self._worse_than_all(goal)
            for goal, value in enumerate(values)
        ]
        return "diverged", tuple(told)

    def _worse_than_all(self, goal: int) -> float:
        """Make up a finite value that is worse than any seen."""
        sign = 1 if self._objective.goals[goal][1] == "minimize" else -1
        seen = [sign * t.values[goal] for t in self.trials if t.state == "complete"]
        worst = max(seen) + max(1.0, abs(max(seen))) if seen else WORST
        return sign * worst

    def _record(self, trial: Trial) -> None:
        """Write a trial, then tell it, then write what telling has changed."""
        before = self._storage.get_study_system_attrs(self._study_id)
        changed = before != self._ledger.study_attrs
        self._ledger.add(trial, before if changed else None)
        self.trials.append(trial)
        self._known.add(trial.policy.fingerprint)
        if trial.state == "failed":
            self._study.tell(trial.number, state=TrialState.FAIL)
        else:
            self._study.tell(trial.number, list(trial.values))
        after = self._storage.get_study_system_attrs(self._study_id)
        attrs = self._trial_attrs(trial.number)
        if after != before or attrs != trial.system_attrs:
            self._ledger.amend(trial.number, attrs, after)

    def _trial_attrs(self, number: int) -> dict[str, Any]:
        return dict(self._study.get_trials(deepcopy=False)[number].system_attrs)

    def _replay(self) -> None:
        """Rebuild the study: trials in their order, with what samplers keep."""
        for number, trial in enumerate(self.trials):
            if trial.number != number:
                raise RunError(
                    f"the ledger in {self._ledger.run_dir} lacks trial {number}. "
                    "Take a copy from before, or choose another run folder."
                )
            failed = trial.state == "failed"
            self._study.add_trial(
                optuna.create_trial(
                    state=TrialState.FAIL if failed else TrialState.COMPLETE,
                    values=None if failed else list(trial.values),
                    params=dict(trial.params),
                    distributions=dict(self._distributions),
                    system_attrs=dict(trial.system_attrs),
                )
            )
        for key, value in self._ledger.study_attrs.items():
            self._storage.set_study_system_attr(self._study_id, key, value)


def _spread(problem: Problem, objective: Objective) -> str | None:
    """Name the priced goal whose range a front without budgets has to span."""
    priced = {entry.metric for entry in problem.prices}
    if problem.budgets or len(objective.goals) < 2:
        return None
    return next((name for name, _ in objective.goals if name in priced), None)


def _admitted(problem: Problem, proposals: Sequence[Proposal]) -> list[Proposal]:
    """Keep the proposals within the budgets, each policy once."""
    kept: dict[str, Proposal] = {}
    for origin, policy in proposals:
        if problem.within(policy):
            kept.setdefault(policy.fingerprint, (origin, policy))
        else:
            log.info("proposal %r is over the budget and left out", origin)
    return list(kept.values())
