"""The Optuna study in memory, rebuilt from the ledger: asks, and learns from rows."""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from autoprune.errors import RunError
from autoprune.policy import Policy
from autoprune.searching.books import Books
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Objective
from autoprune.searching.problem import Problem, Proposal
from autoprune.searching.rows import Trial, utc_now
from autoprune.searching.rungs import Pruner, intermediate, make_pruner
from autoprune.searching.samplers import BudgetedSampler, derive_seed
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.strategies import (
    Brief,
    ExhaustedError,
    PolicySampler,
    SamplerFactory,
)


@dataclass(frozen=True, eq=False)
class Asked:
    """A proposal that is going to be measured.

    Attributes:
        trial: Optuna's.
        row: The trial's row as it is begun.
        rung: The rung that its strategy wants it measured to; None for as far as the
            pruner lets it.
    """

    trial: optuna.Trial
    row: Trial
    rung: int | None


class Asking:
    """A study beside the ledger that it is rebuilt from.

    Args:
        brief: What strategies are told; its history is what the ledger has.
        objective: What is wanted.
        ledger: Open for writing.
        factory: The strategy.
        pruner: What ends a trial at a rung before the last.
        slopes: By number of their trial; grows from outside.

    Attributes:
        orphans: Trials that were begun and never finished, in order: whoever had them
            is gone.
    """

    def __init__(
        self,
        brief: Brief,
        objective: Objective,
        ledger: Ledger,
        factory: SamplerFactory,
        pruner: Pruner,
        slopes: dict[int, SiteSlopes],
    ) -> None:
        self._problem = brief.problem
        self._objective = objective
        self._ledger = ledger
        self._factory = factory
        self._pruner = pruner
        self._seed = brief.seed
        self._rungs = brief.rungs
        # What strategies are told grows with the run: these very lists are theirs.
        self._told = [objective.minimised(trial) for trial in brief.history]
        self._begun: list[Trial] = []
        self._brief = replace(
            brief, history=self._told, pending=self._begun, slopes=slopes
        )
        self._known = {t.policy.fingerprint: len(t.windows) for t in brief.history}
        self._distributions: dict[str, CategoricalDistribution] = {
            **brief.problem.space.distributions()
        }
        self._kept: dict[str, Any] = {}  # of the study's attributes, in the ledger
        # Optuna tells of every study and trial; the run has its own voice.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        spread = _spread(brief.problem, objective)
        self._sampler = BudgetedSampler(self._brief, factory, spread=spread)
        self._storage = Books()
        self._study = optuna.create_study(
            storage=self._storage,
            sampler=self._sampler,
            pruner=make_pruner(pruner, brief.rungs),
            directions=objective.directions,
        )
        self._study_id = self._storage.get_study_id_from_name(self._study.study_name)
        self.orphans = self._replay(brief.history)

    @property
    def underway(self) -> int:
        """How many trials are begun and not finished."""
        return len(self._begun)

    def knows(self, policy: Policy) -> bool:
        """Tell whether a policy was measured, or is being measured."""
        return policy.fingerprint in self._known or any(
            policy == row.policy for row in self._begun
        )

    def ask(self, proposal: Proposal | None) -> Asked:
        """Ask for a policy, or take a given one, and write that it is begun.

        Raises:
            ExhaustedError: If nothing new is left.
            RunError: If the row cannot be written.
        """
        try:
            trial, policy = self._ask(proposal[1] if proposal else None)
        except ExhaustedError:
            self._put_back()
            raise
        row = Trial(
            number=trial.number,
            state="running",
            origin=proposal[0] if proposal else self._factory.name,
            policy=policy,
            params=self._problem.space.params(policy),
            seed=derive_seed(self._seed, trial.number),
            started=utc_now(),
            finished="",
            system_attrs=self._trial_attrs(trial.number),
        )
        attrs = self._study_attrs()
        self._ledger.begin(row, attrs if attrs != self._kept else None)
        self._kept = attrs
        self._begun.append(row)
        return Asked(trial, row, self._rung_of(trial))

    def again(self, asked: Asked) -> Asked:
        """Write that a trial is begun once more."""
        row = replace(asked.row, attempts=asked.row.attempts + 1)
        self._ledger.begin(row)
        self._begun[self._begun.index(asked.row)] = row
        return replace(asked, row=row)

    def tell(self, asked: Asked, trial: Trial) -> Trial:
        """Write a finished trial, then tell it, then write what telling has changed."""
        for name, excess in trial.constraints.items():
            asked.trial.set_constraint(name, excess)
        trial = replace(trial, system_attrs=self._trial_attrs(trial.number))
        before = self._study_attrs()
        self._ledger.add(trial, before if before != self._kept else None)
        self._begun.remove(asked.row)
        insort(self._told, self._objective.minimised(trial), key=_number)
        self._known[trial.policy.fingerprint] = len(trial.windows)
        if trial.state == "failed":
            self._study.tell(trial.number, state=TrialState.FAIL)
        else:
            self._study.tell(trial.number, list(trial.values))
        after = self._study_attrs()
        attrs = self._trial_attrs(trial.number)
        if after != before or attrs != trial.system_attrs:
            self._ledger.amend(trial.number, attrs, after)
        self._kept = after
        return trial

    def _ask(self, given: Policy | None) -> tuple[optuna.Trial, Policy]:
        if given is not None:
            self._sampler.give(self._problem.space.params(given))
        asked, params = self._suggested()
        policy = self._problem.space.policy(params)
        # A space without any choice: Optuna asks no sampler.
        if self.knows(policy) and not self._wants_more(asked, policy):
            raise ExhaustedError(f"the only policy of the space is measured: {policy}")
        return asked, policy

    def _suggested(self) -> tuple[optuna.Trial, dict[str, Any]]:
        """Ask for a trial, with its parameters all at once; see ``Books``."""
        asked = self._study.ask()
        choices = self._distributions.items()
        free = any(not choice.single() for _, choice in choices)
        drawn = asked.relative_params if free else {}
        params = {n: drawn[n] if n in drawn else c.choices[0] for n, c in choices}
        self._storage.set_trial_params(asked._trial_id, params, self._distributions)
        return asked, params

    def _put_back(self) -> None:
        """Let the next trial have the number of one that found nothing to propose."""
        last = self._study.get_trials(deepcopy=False)[-1]
        self._storage.set_trial_state_values(last._trial_id, TrialState.WAITING)

    def _rung_of(self, asked: optuna.Trial) -> int | None:
        wanted = self._trial_attrs(asked.number).get(PolicySampler.NOTES + "rung")
        return None if wanted is None else range(len(self._rungs) or 1)[int(wanted)]

    def _wants_more(self, asked: optuna.Trial, policy: Policy) -> bool:
        """Tell whether a known policy is to be measured on more windows than before."""
        wanted = self._rung_of(asked)
        if not self._rungs or wanted is None:
            return False
        return self._known.get(policy.fingerprint, 0) < self._rungs[wanted]

    def _study_attrs(self) -> dict[str, Any]:
        return dict(self._storage.get_study_system_attrs(self._study_id))

    def _trial_attrs(self, number: int) -> dict[str, Any]:
        return dict(self._study.get_trials(deepcopy=False)[number].system_attrs)

    def _replay(self, finished: Sequence[Trial]) -> list[Asked]:
        """Rebuild the study, trials in their order, with what samplers keep."""
        orphans = []
        rows = sorted([*finished, *self._ledger.running()], key=_number)
        for number, trial in enumerate(rows):
            if trial.number != number:
                raise RunError(
                    f"the ledger in {self._ledger.run_dir} lacks trial {number}. "
                    "Take a copy from before, or choose another run folder."
                )
            if trial.state == "running":
                orphans.append(self._ask_again(trial))
            else:
                self._study.add_trial(self._as_finished(trial))
        for key, value in self._ledger.study_attrs.items():
            self._storage.set_study_system_attr(self._study_id, key, value)
        self._kept = self._study_attrs()
        return orphans

    def _ask_again(self, row: Trial) -> Asked:
        """Ask for what a trial was begun with: Optuna takes it for a running one."""
        self._sampler.give(dict(row.params))
        trial, _ = self._suggested()
        for key, value in row.system_attrs.items():
            self._storage.set_trial_system_attr(trial._trial_id, key, value)
        self._begun.append(row)
        return Asked(trial, row, self._rung_of(trial))

    def _as_finished(self, trial: Trial) -> optuna.trial.FrozenTrial:
        failed = trial.state == "failed"
        return optuna.create_trial(
            state=TrialState.FAIL if failed else TrialState.COMPLETE,
            values=None if failed else list(trial.values),
            params=dict(trial.params),
            distributions=dict(self._distributions),
            system_attrs=dict(trial.system_attrs),
            intermediate_values=intermediate(self._pruner, trial, self._rungs),
        )


def _number(trial: Trial) -> int:
    return trial.number


def _spread(problem: Problem, objective: Objective) -> str | None:
    """Name the priced goal whose range a front without budgets has to span."""
    priced = {entry.metric for entry in problem.prices}
    if problem.budgets or len(objective.goals) < 2:
        return None
    return next((name for name, _ in objective.goals if name in priced), None)
