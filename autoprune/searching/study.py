"""The Optuna study of a run: ask, evaluate, write, tell; rebuilt from the ledger."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import optuna
from jaxtyping import Float
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from autoprune.errors import RunError
from autoprune.policy import Policy
from autoprune.searching.judge import Judge
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Objective
from autoprune.searching.problem import Problem, Proposal
from autoprune.searching.rows import Trial, utc_now
from autoprune.searching.rungs import Pruner, intermediate, make_pruner
from autoprune.searching.samplers import BudgetedSampler, derive_seed
from autoprune.searching.strategies import (
    Brief,
    ExhaustedError,
    PolicySampler,
    SamplerFactory,
)
from autoprune.searching.survey import Survey
from autoprune.searching.trial import Evaluator

log = logging.getLogger(__name__)

Reason = Literal["trials", "time", "stopped", "exhausted"]
"""Why a search ended: enough trials, no time for another, told to, nothing new left."""


def run_study(
    problem: Problem,
    evaluator: Evaluator,
    *,
    ledger: Ledger,
    sampler: SamplerFactory,
    objective: Objective,
    seed: int,
    rungs: tuple[int, ...] = (),
    pruner: Pruner = "race",
    sensitivities: Float[np.ndarray, "sites choices"] | None = None,
    trials: int | None = None,
    deadline: float | None = None,
    proposals: Sequence[Proposal] = (),
    on_trial: Callable[[Trial], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Reason:
    """Search, from where the ledger stands, until there is a reason to end.

    Args:
        problem: What may be chosen, its prices and budgets.
        evaluator: Measures policies; what it raises fails the trial, and the search
            goes on.
        ledger: Open for writing.
        sampler: The strategy.
        objective: What is wanted.
        seed: Of everything random; equal seed and measurements, equal policies.
        rungs: Windows at which a trial may end, ascending; the last is the whole split.
            Empty for no rungs.
        pruner: What ends a trial at a rung before the last.
        sensitivities: What every choice costs by itself, if the strategy needs it.
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
        Exception: Whatever ``evaluator`` raised in ``judge.FAILURES`` trials in a row.
    """
    brief = Brief(
        seed=seed,
        objectives=len(objective.goals),
        problem=problem,
        history=ledger.trials(),
        sensitivities=sensitivities,
        rungs=rungs,
    )
    search = _Search(brief, objective, ledger, sampler, evaluator, pruner)
    queue = problem.admitted(proposals)
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
            trial = search.step(queue.pop(0) if queue else None)
        except ExhaustedError as error:
            log.info("the search ends: %s", error)
            return "exhausted"
        if on_trial is not None:
            on_trial(trial)
        search.judge.raise_if_failing()


class _Search:
    """A study in memory beside the ledger that it was rebuilt from."""

    def __init__(
        self,
        brief: Brief,
        objective: Objective,
        ledger: Ledger,
        factory: SamplerFactory,
        evaluator: Evaluator,
        pruner: Pruner,
    ) -> None:
        self.trials = list(brief.history)
        self._survey = Survey(evaluator, ledger, factory)
        # What strategies are told grows with the run: these very lists are theirs.
        self._told = [objective.minimised(trial) for trial in self.trials]
        self._brief = replace(brief, history=self._told, slopes=self._survey.slopes)
        self._problem = brief.problem
        self._objective = objective
        self._ledger = ledger
        self._factory = factory
        self.judge = Judge(evaluator, objective, brief.rungs, pruner, self.trials)
        self._pruner = pruner
        self._seed = brief.seed
        self._rungs = brief.rungs
        self._known = {t.policy.fingerprint: len(t.windows) for t in self.trials}
        self._distributions: dict[str, BaseDistribution] = {
            **brief.problem.space.distributions()
        }
        self._walls: list[float] = []
        # Optuna tells of every study and trial; the run has its own voice.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        spread = _spread(brief.problem, objective)
        self._sampler = BudgetedSampler(self._brief, factory, spread=spread)
        self._storage = optuna.storages.InMemoryStorage()
        self._study = optuna.create_study(
            storage=self._storage,
            sampler=self._sampler,
            pruner=make_pruner(pruner, brief.rungs),
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

    def step(self, proposal: Proposal | None) -> Trial:
        """Do one trial, and have it on disk before the study learns of it."""
        began, started = time.monotonic(), utc_now()
        if proposal is None:
            best = self.judge.incumbent
            refused = bool(self.trials) and best is not self.trials[-1]
            self._survey.take(best, refused=refused)
        learned = time.monotonic()
        asked, policy = self._ask(proposal[1] if proposal else None)
        proposed = time.monotonic()
        wanted = self._rung_of(asked)
        score, error, whole = self.judge.measure(asked, policy, wanted)
        evaluated = time.monotonic()
        state, values = self.judge.verdict(score, error, whole)
        limits = self._objective.limits if error is None else ()
        constraints = {limit.metric: limit.excess(score.metrics) for limit in limits}
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
            metrics=score.metrics,
            constraints=constraints,
            timings={
                "slopes_s": learned - began,
                "propose_s": proposed - learned,
                "evaluate_s": evaluated - proposed,
            },
            system_attrs=self._trial_attrs(asked.number),
            windows=score.windows,
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
        # A space without any choice: Optuna asks no sampler.
        if self.knows(policy) and not self._wants_more(asked, policy):
            raise ExhaustedError(f"the only policy of the space is measured: {policy}")
        return asked, policy

    def _rung_of(self, asked: optuna.Trial) -> int | None:
        """Tell on which rung a strategy wants its proposal; None if it does not say."""
        wanted = self._trial_attrs(asked.number).get(PolicySampler.NOTES + "rung")
        return None if wanted is None else range(len(self._rungs) or 1)[int(wanted)]

    def _wants_more(self, asked: optuna.Trial, policy: Policy) -> bool:
        """Tell whether a known policy is to be measured on more windows than before."""
        wanted = self._rung_of(asked)
        if not self._rungs or wanted is None:
            return False
        return self._known[policy.fingerprint] < self._rungs[wanted]

    def _record(self, trial: Trial) -> None:
        """Write a trial, then tell it, then write what telling has changed."""
        before = self._storage.get_study_system_attrs(self._study_id)
        changed = before != self._ledger.study_attrs
        self._ledger.add(trial, before if changed else None)
        self.trials.append(trial)
        self._told.append(self._objective.minimised(trial))
        self._known[trial.policy.fingerprint] = len(trial.windows)
        self.judge.consider(trial)
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
                    intermediate_values=intermediate(self._pruner, trial, self._rungs),
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
