"""Every strategy, as an Optuna sampler whose proposals keep to the budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from jaxtyping import Int
from numpy.random import Generator
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autoprune.searching.budget import Budget, prices_of
from autoprune.searching.projection import Projection
from autoprune.searching.strategies import (
    Brief,
    ExhaustedError,
    PolicySampler,
    SamplerFactory,
)

ATTEMPTS = 96
"""Changes tried on a proposal that stands in the study, before none is believed new."""


def derive_seed(seed: int, number: int) -> int:
    """Derive the seed of a trial, in [0, 2**32), from the run's and the trial's number.

    So a proposal depends on the study's history alone, and a resumed run proposes what
    an uninterrupted one would.
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


class BudgetedSampler(BaseSampler):
    """Wraps an Optuna sampler so that every proposal is new and within the budgets.

    For each trial the inner sampler is made afresh, asked for all sites, and its answer
    moved on to the budgets before Optuna records it: the study learns from what was
    evaluated. What the inner one leaves open it samples site by site. Where the factory
    names ``changes``, only so many sites leave a good policy, before the budgets act.

    Args:
        brief: What the inner samplers are told; its lists may grow meanwhile.
        factory: Makes the inner sampler.
        spread: An additive metric over whose whole range policies are spread that are
            drawn independently. Hundreds of independent draws all cost nearly the
            same, and show nothing of a front. None leaves them so.
    """

    def __init__(
        self, brief: Brief, factory: SamplerFactory, *, spread: str | None = None
    ) -> None:
        self._brief = brief
        self._problem = brief.problem
        self._factory = factory
        self._seed = brief.seed
        self._spread = spread
        self._choices = brief.problem.space.distributions()
        self._free = {n: d for n, d in self._choices.items() if not d.single()}
        self._probe = _one_trial_study(self._choices, brief.objectives)
        self._inner: dict[int, BaseSampler] = {}
        self._given: dict[str, str] | None = None
        self._seen: set[bytes] = set()
        self._scanned = 0

    def give(self, params: Mapping[str, str]) -> None:
        """Make the next trial take these parameters, as if they were proposed.

        Unlike with Optuna's ``enqueue_trial``, the inner sampler keeps its books for
        this trial: with NSGA-II it belongs to a generation, and may become a parent.
        """
        self._given = dict(params)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Make the inner sampler of this trial. Called by ``Study.ask``."""
        seed = derive_seed(self._seed, trial.number)
        inner = self._factory.make(replace(self._brief, seed=seed))
        self._inner[trial.number] = inner
        inner.before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Let the inner sampler keep its books. Called by ``Study.tell``."""
        self._inner.pop(trial.number).after_trial(study, trial, state, values)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Propose all sites together: only a whole policy can be priced."""
        return dict(self._free)

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Propose a policy.

        Raises:
            ExhaustedError: If no policy could be found that the study has not.
        """
        inner = self._inner[trial.number]
        given, self._given = self._given, None
        own = isinstance(inner, PolicySampler)
        if given is not None and own:
            # Such a strategy keeps no books beside the rows, and its notes would mark
            # another policy than the one they were made for.
            return self._take(given, search_space)
        # The space never changes. Asked over the real study, an inner sampler would
        # compare the space of every trial again, for every proposal.
        joint = inner.infer_relative_search_space(self._probe, trial)
        proposal = inner.sample_relative(study, trial, joint)
        if given is not None:
            return self._take(given, search_space)
        if own and (_asks_for_more(study, trial) or self._is_ready(proposal, study)):
            return self._take(proposal, search_space)
        independent = not proposal
        for name, choices in self._free.items():
            if name not in proposal:
                proposal[name] = inner.sample_independent(study, trial, name, choices)
        rng = np.random.default_rng([self._seed, trial.number])
        start = self._near_good(self._indices(proposal), study, rng)
        if independent and self._spread:
            start = self._anywhere(start, self._spread, rng)
        indices = self._new(start, self._known(study), rng)
        self._seen.add(indices.tobytes())
        pairs = zip(self._choices.items(), indices, strict=True)
        params = {name: choices.choices[i] for (name, choices), i in pairs}
        return {name: params[name] for name in search_space}

    def _take(
        self, params: Mapping[str, str], search_space: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Make whole parameters the proposal, as they are."""
        self._seen.add(self._indices(params).tobytes())
        return {name: params[name] for name in search_space}

    def _is_ready(self, params: Mapping[str, str], study: Study) -> bool:
        """Tell whether a whole policy is new and keeps the budgets by itself."""
        indices = self._indices(params)
        if indices.tobytes() in self._known(study):
            return False
        projection, budgets = self._problem.projection, self._problem.budgets
        if projection is None:
            return True
        limits = [budget.limit for budget in budgets]
        return bool((projection.totals(indices) <= limits).all())

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Sample a parameter that is no site, as the inner sampler does."""
        return self._inner[trial.number].sample_independent(
            study, trial, param_name, param_distribution
        )

    def _indices(self, params: Mapping[str, Any]) -> NDArray[np.int64]:
        return np.array(
            [
                choices.choices.index(params[name]) if name in self._free else 0
                for name, choices in self._choices.items()
            ],
            dtype=np.int64,
        )

    def _known(self, study: Study) -> set[bytes]:
        """Give the policies of the study; it only grows, so each is read once."""
        trials = study.get_trials(deepcopy=False)
        for trial in trials[self._scanned :]:
            if trial.params.keys() >= self._free.keys():
                self._seen.add(self._indices(trial.params).tobytes())
        self._scanned = max(0, len(trials) - 1)  # the last is being asked for
        return self._seen

    def _anywhere(
        self, start: NDArray[np.int64], metric: str, rng: Generator
    ) -> NDArray[np.int64]:
        """Move a proposal on to a price drawn from the whole range of the space."""
        space, prices = self._problem.space, self._problem.prices
        lowest, highest = prices_of(metric, prices).reach(space)
        budget = Budget(metric, float(rng.uniform(lowest, highest)))
        return Projection(space, prices, [budget]).fit(start, rng)

    def _near_good(
        self, proposal: NDArray[np.int64], study: Study, rng: Generator
    ) -> NDArray[np.int64]:
        """Take a few sites of a proposal, and the rest of a good policy."""
        good = _good_trial(study, rng) if self._factory.changes else None
        if good is None or self._factory.changes is None:
            return proposal
        mixed = self._indices(good.params)
        other = rng.permutation(np.flatnonzero(mixed != proposal))
        taken = other[: rng.integers(1, self._factory.changes, endpoint=True)]
        mixed[taken] = proposal[taken]
        return mixed

    def _new(
        self, start: NDArray[np.int64], known: set[bytes], rng: Generator
    ) -> Int[np.ndarray, " sites"]:
        """Move a proposal on to the budgets, changing it until it is new."""
        projection = self._problem.projection
        counts = np.array([len(d.choices) for d in self._choices.values()])
        indices = start
        for attempt in range(ATTEMPTS):
            fitted = projection.fit(indices, rng) if projection else indices
            if fitted.tobytes() not in known:
                return fitted
            # One site, then ever more: the least change that makes it new.
            changed = rng.permutation(len(start))[: 1 << (attempt // 8)]
            indices = start.copy()
            indices[changed] = rng.integers(counts[changed])
        raise ExhaustedError(
            f"{ATTEMPTS} changes of a proposal gave only policies that the study has; "
            f"it has {len(known)} of {self._problem.space.policies:,}"
        )


def _asks_for_more(study: Study, trial: FrozenTrial) -> bool:
    """Tell whether a strategy wants a known policy measured on more windows."""
    attrs = study.get_trials(deepcopy=False)[trial.number].system_attrs
    return bool(attrs.get(PolicySampler.NOTES + "rung", 0))


def _good_trial(study: Study, rng: Generator) -> FrozenTrial | None:
    """Pick the best trial; of several objectives, the best in a random direction."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not trials:
        return None
    broken = np.array([sum(max(0, v) for v in t.constraints.values()) for t in trials])
    values = np.array([trial.values for trial in trials])
    maximised = [way == StudyDirection.MAXIMIZE for way in study.directions]
    values[:, maximised] *= -1
    ranks = values.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    score = ranks @ rng.dirichlet(np.ones(values.shape[1]))
    return trials[int(np.lexsort((score, broken))[0])]


def _one_trial_study(
    choices: Mapping[str, optuna.distributions.CategoricalDistribution], objectives: int
) -> Study:
    """Make a study whose one trial shows the whole space."""
    study = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(), directions=["minimize"] * objectives
    )
    study.add_trial(
        optuna.create_trial(
            params={name: choice.choices[0] for name, choice in choices.items()},
            distributions=dict(choices),
            values=[0.0] * objectives,
        )
    )
    return study
