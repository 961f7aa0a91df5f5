"""The search over schedules: which finalist, trained how, is best in the end.

A study of its own, of at most some dozens of trainings. Each is cheap first: a course
is carried out with a share of its tokens, and goes on to all of them only if it is
among the best third so far. What training costs may count. Rows stand in a ledger, as
those of any part of a run; a search that was killed goes on, and a training that was
killed with it does, too.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import optuna
import torch

from autoprune.errors import AutoPruneError
from autoprune.evaluation.metric import Measured
from autoprune.evaluation.scheduled import course_of, trained_bank
from autoprune.policy import Policy, digest
from autoprune.search_config import RecoveryConfig
from autoprune.searching.courses import CourseSpace, shortened
from autoprune.searching.driving import TRIES
from autoprune.searching.ends import Reason
from autoprune.searching.finals import Candidate, Cost, Finalist
from autoprune.searching.ledger import Ledger
from autoprune.searching.plan import Plan
from autoprune.searching.rows import State, Trial, utc_now
from autoprune.training.course import Course

PART = "recovery"
"""Folder of the search over schedules in a run folder."""

ORIGIN = "recovery"
"""Where its trials say that they come from."""

REDUCTION = 3
"""One of so many goes on after the short training."""

PASSES_OF_TRAINING = 12.0
"""Forward passes that training on as many tokens is worth, before one was timed. About
eleven on SmolLM2-135M: 270 CPU seconds of ``distill`` for 16,384 tokens, 0.74 for a
window of 512 that is measured."""


@dataclass(frozen=True, eq=False)
class RecoverySearch:
    """Searches over finalists and courses.

    Attributes:
        plan: Of the run.
        ledger: Of this part, open for writing.
        cost: What finalists are compared by; less is better.
        starts: The finalists, the best first.
        left: Tells how many seconds are left for it.
        now: Gives seconds by the same clock.
        tell: Hears what is done.
        on_trial: Called after the row of a trial is on disk.
        advance: Hears how far a training is, in thousandths.
        stop: Asked between trials.
    """

    plan: Plan
    ledger: Ledger
    cost: Cost
    starts: Sequence[Finalist]
    left: Callable[[], float]
    now: Callable[[], float]
    tell: Callable[[str], None]
    on_trial: Callable[[Trial], None]
    advance: Callable[[int, int], None]
    stop: Callable[[], bool]

    @property
    def config(self) -> RecoveryConfig:
        """What was asked for."""
        assert self.plan.config.recovery is not None
        return self.plan.config.recovery

    def run(self) -> Reason:
        """Carry courses out until there is a reason to end."""
        bench = self.plan.bench
        space = CourseSpace.parse(self.config.schedules, partial(course_of, bench))
        trials = self.ledger.trials()
        while True:
            open_pairs = self._untried(space, trials)
            if not open_pairs:
                return "exhausted"
            if self.config.trials is not None and len(trials) >= self.config.trials:
                return "trials"
            if self.stop():
                return "stopped"
            pairs = [
                pair
                for pair in open_pairs
                if self._lasts(pair[1], trials) < self.left()
            ]
            if not pairs:
                return "time"
            trial = self._next(space, trials, pairs)
            trials.append(trial)
            self.on_trial(trial)

    def best(self, count: int) -> list[Finalist]:
        """Give the best of what was trained in full, measured on the choice split."""
        kept = [trial for trial in self.ledger.trials() if trial.feasible]
        kept.sort(key=lambda trial: (trial.values, trial.number))
        found = []
        for trial in kept[:count]:
            candidate = Candidate(
                trial.number, trial.policy.schedule, trial.policy, trial.metrics, PART
            )
            bank = trained_bank(self.plan.bench, trial.policy)
            choice = self.plan.bench.measure(trial.policy, bank, "choice")
            found.append(Finalist(candidate, bank, choice))
        return found

    def _untried(
        self, space: CourseSpace, trials: Sequence[Trial]
    ) -> list[tuple[str, Course]]:
        """List finalists with the courses that were not carried out on them."""
        done = {trial.policy.fingerprint for trial in trials}
        return [
            (name, course)
            for name, start in self._policies.items()
            for course in space.courses
            if replace(start, schedule=course.text).fingerprint not in done
        ]

    @cached_property
    def _policies(self) -> dict[str, Policy]:
        """The finalists' policies, by what a trial calls them."""
        policies = [one.candidate.policy for one in self.starts]
        return {policy.fingerprint: policy for policy in policies}

    def _next(
        self,
        space: CourseSpace,
        trials: Sequence[Trial],
        pairs: Sequence[tuple[str, Course]],
    ) -> Trial:
        """Draw a finalist and a course, and carry it out."""
        number = len(trials)
        seed = int(digest([self.plan.config.search.seed, PART, number]), 16) % 2**32
        study = self._study(space, trials, seed)
        asked = study.ask()
        name = asked.suggest_categorical("finalist", list(self._policies))
        course = space.suggest(asked)
        known = [(finalist, one.text) for finalist, one in pairs]
        if (name, course.text) not in known:  # tried already, or no time for it
            generator = torch.Generator().manual_seed(seed)
            drawn = int(torch.randint(len(pairs), (), generator=generator))
            name, course = pairs[drawn]
        params = {"finalist": name, **space.params(course)}
        killed = {trial.number: trial.attempts for trial in self.ledger.running()}
        begun = Trial(
            number,
            "running",
            ORIGIN,
            replace(self._policies[name], schedule=course.text),
            params,
            seed,
            started=utc_now(),
            finished="",
            attempts=killed.get(number, 0) + 1,
        )
        if begun.attempts > TRIES:
            done = _failed(begun, f"its process ended {TRIES} times on the way")
            self.ledger.add(done)
            return done
        self.ledger.begin(begun)
        place = list(self._policies).index(name) + 1
        self.tell(f"trial {number}: finalist {place}, {course.text}")
        done = self._measured(begun, course, study)
        self.ledger.add(done)
        if done.error:
            self.tell(f"trial {number} failed: {done.error}")
        return done

    def _measured(self, begun: Trial, course: Course, study: optuna.Study) -> Trial:
        """Carry a course out, first in short; give the row of its trial."""
        began = self.now()
        short: float | None = None
        state: State
        tokens, state = 0, "complete"
        try:
            if self.config.short < 1:
                brief = self._shortened(course)
                policy = replace(begun.policy, schedule=brief.text)
                tokens += brief.tokens
                measured = self._measure(policy)
                short = self.cost(measured)
                state = "complete" if self._goes_on(short, study) else "pruned"
            if state == "complete":
                tokens += course.tokens
                measured = self._measure(begun.policy)
        except AutoPruneError as failure:
            return _failed(begun, str(failure))
        value = self.cost(measured)
        if not math.isfinite(value):
            state = "diverged"
        price = self.config.price * tokens / 1e6
        return replace(
            begun,
            state=state,
            finished=utc_now(),
            values=(value + price,) if state == "complete" else (),
            metrics={**measured.metrics, "training_tokens": float(tokens)},
            constraints={
                limit.metric: limit.excess(measured.metrics)
                for limit in self.plan.objective.limits
            },
            timings={"train_s": self.now() - began},
            system_attrs={} if short is None else {"short": short},
        )

    def _shortened(self, course: Course) -> Course:
        parse = partial(course_of, self.plan.bench)
        return shortened(course, self.config.short, parse)

    def _measure(self, policy: Policy) -> Measured:
        bench = self.plan.bench
        bank = trained_bank(bench, policy)
        bank.make(bench.per_layer(policy).items(), self.advance)
        return bench.measure(policy, bank, "fitness")

    def _rivals(self, study: optuna.Study) -> list[float]:
        """List what other courses have reached in short."""
        return [t.user_attrs["short"] for t in study.trials if "short" in t.user_attrs]

    def _goes_on(self, short: float, study: optuna.Study) -> bool:
        """Tell whether a course is in the best third of those in short."""
        others = self._rivals(study)
        better = sum(other < short for other in others)
        return math.isfinite(short) and better < (len(others) + 1) / REDUCTION

    def _lasts(self, course: Course, trials: Sequence[Trial]) -> float:
        """Foresee how many seconds a course will take, what comes in short included."""
        short = self.config.short if self.config.short < 1 else 0.0
        tokens = course.tokens * (1.0 + short)
        timed = [t for t in trials if t.metrics.get("training_tokens")]
        if timed:
            spent = math.fsum(trial.timings["train_s"] for trial in timed)
            seen = math.fsum(trial.metrics["training_tokens"] for trial in timed)
            return tokens * spent / seen
        measured = self.starts[0].choice.timings.get("run_s", 0.0)
        seen = self.plan.bench.splits["choice"].ids.numel()
        return tokens * PASSES_OF_TRAINING * measured / seen

    def _study(
        self, space: CourseSpace, trials: Sequence[Trial], seed: int
    ) -> optuna.Study:
        """Build the study anew from the rows, with a sampler of its own seed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=2 * len(space.families),
                group=True,
                multivariate=True,
            )
        study = optuna.create_study(sampler=sampler)
        for trial in trials:
            if trial.params["finalist"] in self._policies:  # not one of an earlier end
                study.add_trial(self._frozen(space, trial))
        return study

    def _frozen(self, space: CourseSpace, trial: Trial) -> optuna.trial.FrozenTrial:
        """Give a row as Optuna has it; what was given up counts by its short value."""
        short = trial.system_attrs.get("short")
        names = tuple(self._policies)
        named = {k: v for k, v in trial.params.items() if k != "finalist"}
        distributions: dict[str, Any] = {
            "finalist": optuna.distributions.CategoricalDistribution(names),
            **space.distributions(named),
        }
        states = optuna.trial.TrialState
        state = {"complete": states.COMPLETE, "pruned": states.PRUNED}
        return optuna.trial.create_trial(
            state=state.get(trial.state, states.FAIL),
            value=trial.values[0] if trial.state == "complete" else None,
            params=dict(trial.params),
            distributions=distributions,
            user_attrs={} if short is None else {"short": short},
            intermediate_values={} if short is None else {1: short},
        )


def _failed(begun: Trial, error: str) -> Trial:
    return replace(begun, state="failed", finished=utc_now(), error=error)
