"""An outer study over at most 20 knobs, whose inner policy is the exact allocation.

TPE, CMA-ES and Gaussian processes find nothing in hundreds of sites, and much in twenty
numbers. A knob bends what the sensitivities say of many choices at once; the allocation
under the budgets then decides every site.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import optuna
from jaxtyping import Int
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, TPESampler
from optuna.study import Study
from optuna.trial import TrialState, create_trial

from autoprune.errors import ConfigError
from autoprune.hookspecs import hookimpl
from autoprune.searching.allocation import allocate
from autoprune.searching.knobs import bend, free_sites, knobs_of
from autoprune.searching.rows import Trial
from autoprune.searching.strategies import (
    Brief,
    PolicySampler,
    SamplerFactory,
    notes_of,
)

REACH = 1.5
"""A knob lies within plus and minus this, as a natural logarithm: 0.22 to 4.5 times."""

SPREAD = 0.5
"""Standard deviation of the first draws around zero, where CMA-ES begins as well."""

STARTUP = 8
"""Outer trials around zero before TPE and Gaussian processes have a model."""

ASKS = 4
"""Times that the outer study is asked; an allocation that was measured is told at once
and costs no trial, but solves a program."""


GENERATION = "cma:generation"
"""Where Optuna's CMA-ES keeps the generation that a trial belongs to."""


Make = Callable[[int], BaseSampler]


class _Asked(NamedTuple):
    """Knobs that the outer study gave, and the row that tells what came of them."""

    knobs: dict[str, float]
    generation: int | None
    row: Trial


class KnobSampler(PolicySampler):
    """Proposes the allocation of sensitivities that an outer Optuna study has bent.

    What a choice costs is its sensitivity times ``exp`` of the knobs that act on it:
    one for each role of layers, for depth, and for each kind of action (pruning against
    quantization, method, damping, granularity). The first proposal has all knobs at
    zero: the plain allocation.

    The outer study is rebuilt from the ledger's rows for every proposal. CMA-ES keeps
    its state as a pickle, and a pickle out of a run folder is not to be loaded. So the
    row keeps the generation only, and the first trial of every generation is asked for
    again, which makes the same state from the same rows.

    Args:
        brief: All that a proposal may depend on; its sensitivities are needed.
        name: Of the strategy: the origin of its rows.
        make: Makes the outer sampler from a seed.
        startup: Outer trials around zero before it is asked.

    Raises:
        ConfigError: If there are no sensitivities, or no budget: all would be dense.
    """

    def __init__(self, brief: Brief, *, name: str, make: Make, startup: int) -> None:
        super().__init__(brief)
        if brief.sensitivities is None or not brief.problem.budgets:
            lacks = "budget" if brief.sensitivities is not None else "sensitivities"
            raise ConfigError(
                f"the strategy {name!r} solves for the least sum of sensitivities "
                f"within a budget, found no {lacks}. Give it one, or take another."
            )
        self._costs = brief.sensitivities
        self._name, self._make, self._startup = name, make, startup
        self._rng = brief.rng()
        self._knobs = knobs_of(self.space)
        self._outer_space: dict[str, BaseDistribution] = {
            name: FloatDistribution(-REACH, REACH) for name in self._knobs
        }
        self._free = [site.name for site in free_sites(self.space).values()]

    def propose(self) -> tuple[Int[np.ndarray, " sites"], Mapping[str, Any]]:
        """Give the allocation under new knobs; the notes hold the knobs.

        Knobs whose allocation was measured before are told that row's value and noted
        as repeats; other knobs are then asked for.

        Raises:
            BudgetError: If no policy is within the budgets.
        """
        measured = {self._key(t.params): t for t in self.brief.history if t.values}
        study = self._rebuild()
        repeats: list[dict[str, Any]] = []
        while True:
            trial = self._ask(study)
            attrs = study._storage.get_trial(trial._trial_id).system_attrs
            note = {"knobs": trial.params, "generation": attrs.get(GENERATION)}
            costs = bend(self._costs, self._knobs, trial.params)
            indices = allocate(self.problem, costs)
            row = measured.get(self._key(self.space.params(self.space.at(indices))))
            if row is None or len(repeats) == ASKS - 1:
                return indices, {**note, "repeats": repeats}
            study.tell(trial, self._value(row))
            repeats.append({**note, "row": row.number})

    def _key(self, params: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(params[name] for name in self._free)

    def _asked(self) -> Iterator[_Asked]:
        """Read what the outer study gave so far, in its order."""
        rows = {trial.number: trial for trial in self.brief.history}
        for row in rows.values():
            notes = notes_of(row)
            # A rival's row has the notes of the proposal whose place it took.
            if row.origin == self._name and "knobs" in notes:
                for past in notes["repeats"]:
                    yield _Asked(past["knobs"], past["generation"], rows[past["row"]])
                yield _Asked(notes["knobs"], notes["generation"], row)

    @cached_property
    def _worst(self) -> float | None:
        own = [asked.row for asked in self._asked()]
        return max((row.values[0] for row in own if _is_good(row)), default=None)

    def _value(self, row: Trial) -> float | None:
        """Give what the outer study is told; None if the trial failed.

        A trial that diverged or broke a limit is told as the worst of the others: a
        made-up number far from all would blind a Gaussian process to what differs.
        """
        if not row.values:
            return None
        return row.values[0] if _is_good(row) or self._worst is None else self._worst

    def _rebuild(self) -> Study:
        """Make the outer study as it was after the last row."""
        sampler = self._make(self.brief.seed)
        storage = optuna.storages.InMemoryStorage()
        study = optuna.create_study(storage=storage, sampler=sampler)
        last = 0
        for knobs, generation, row in self._asked():
            value = self._value(row)
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
            if generation is not None and generation > last:
                last = generation
                study.enqueue_trial(knobs)
                again = study.ask(self._outer_space)
                # Optuna itself asks for nothing where all values are given.
                frozen = storage.get_trial(again._trial_id)
                joint = sampler.infer_relative_search_space(study, frozen)
                sampler.sample_relative(study, frozen, joint)
                study.tell(again, value, state)
                continue
            trial = create_trial(
                state=state,
                value=value,
                params=knobs,
                distributions=self._outer_space,
                system_attrs={} if generation is None else {GENERATION: generation},
            )
            study.add_trial(trial)
        return study

    def _ask(self, study: Study) -> optuna.Trial:
        """Ask for knobs: zeros first, then draws around them, then the sampler's."""
        trials = study.get_trials(deepcopy=False)
        told = sum(trial.state == TrialState.COMPLETE for trial in trials)
        # CMA-ES cannot do with one knob, and needs none.
        if told < self._startup or len(self._knobs) < 2:
            drawn = self._rng.normal(0, SPREAD if trials else 0, len(self._knobs))
            values = np.clip(drawn, -REACH, REACH).tolist()
            study.enqueue_trial(dict(zip(self._knobs, values, strict=True)))
        return study.ask(self._outer_space)


def _is_good(row: Trial) -> bool:
    """Tell whether a row's value was measured, maybe in part, within all limits."""
    kept = all(excess <= 0 for excess in row.constraints.values())
    return row.state in ("complete", "pruned") and kept


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(
        multivariate=True, constant_liar=False, n_startup_trials=STARTUP, seed=seed
    )


def _cmaes(seed: int) -> BaseSampler:
    # Begins at the middle with a sixth of the range: at zero with ``SPREAD``.
    return CmaEsSampler(seed=seed)


def _gp(seed: int) -> BaseSampler:
    return GPSampler(n_startup_trials=STARTUP, seed=seed)


@hookimpl
def register_samplers() -> list[SamplerFactory]:
    """Return the strategies: one outer study, by three samplers."""
    kinds = (
        ("knobs", _tpe, STARTUP, "TPE over knobs that bend the allocation's costs"),
        ("cmaes", _cmaes, 1, "CMA-ES over these knobs; wants hundreds of trials"),
        ("gp", _gp, STARTUP, "a Gaussian process over these knobs; slow to propose"),
    )
    needs = frozenset({"sensitivities"})
    return [
        SamplerFactory(
            name,
            partial(KnobSampler, name=name, make=make, startup=startup),
            help_,
            needs=needs,
            several=False,
        )
        for name, make, startup, help_ in kinds
    ]
