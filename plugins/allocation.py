"""Allocation: the exact optimum of an additive score, re-fitted to what is measured."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from optuna.samplers import BaseSampler

from autoprune.errors import ConfigError
from autoprune.hookspecs import hookimpl
from autoprune.searching.allocation import allocate
from autoprune.searching.refit import fit_multipliers
from autoprune.searching.rows import Trial
from autoprune.searching.strategies import Brief, PolicySampler, SamplerFactory

NOISE = 0.25
"""Spread of the logarithm of the noise on costs; twice as much in each repeat."""

TURNS = 2
"""Every other proposal has noise: the optimum moves by a few sites a fit, and trials so
alike teach nothing of hundreds of multipliers."""

REPEATS = 8
"""Solutions in search of one that was not measured."""

MEASURED = ("complete", "pruned")
"""Trials that are fitted. Of one that was given up, Optuna was told what its KL would
be on all windows."""

ENOUGH = 3
"""Trials from which on multipliers are fitted."""


class AllocationSampler(PolicySampler):
    """Solves, and after every trial fits a multiplier a site, and solves again.

    The model is KL = constant + sum over sites of multiplier x sensitivity. It starts
    from multipliers of 1 and is fitted by ridge regression towards their common mean
    on all trials, also those that were given up: what is bad has to be known, or it is
    proposed again. So what trials tell of a site moves it and nothing else does. SPDY
    (Frantar and Alistarh, ICML 2022) searches such multipliers at random; the fit uses
    what every trial has shown.

    Raises:
        ConfigError: If there are no sensitivities or no budget.
    """

    def __init__(self, brief: Brief) -> None:
        super().__init__(brief)
        if brief.sensitivities is None or not brief.problem.budgets:
            what = "sensitivities" if brief.problem.budgets else "a budget"
            raise ConfigError(
                f"the strategy 'allocation' needs {what} and found none. Measure "
                "sensitivities and set a budget, or take the strategy 'nsga2'."
            )
        # Noise in what was measured can make a choice seem better than none.
        self._costs = np.maximum(brief.sensitivities, 0).astype(np.float64)
        names = self.space.distributions()
        self._positions = [
            (name, {text: i for i, text in enumerate(choices.choices)})
            for name, choices in names.items()
        ]

    def propose(self) -> tuple[Int[np.ndarray, " sites"], Mapping[str, Any]]:
        """Solve with the fit; with noise at every other turn and in repeats."""
        history = self.brief.history
        tried = {trial.number: self._indices(trial) for trial in history}
        known = {indices.tobytes() for indices in tried.values()}
        measured = [t for t in history if t.state in MEASURED and t.values]
        chosen = np.array([tried[t.number] for t in measured], dtype=np.int64)
        costs = self._costs
        if len(measured) >= ENOUGH:
            features = self._costs[np.arange(len(self._costs)), chosen]
            values = np.array([trial.values[0] for trial in measured])
            fitted = fit_multipliers(features, values)
            costs = self._costs * fitted[:, None]
        rng = self.brief.rng()
        noise, found = 0.0, allocate(self.problem, costs)
        explores = len(measured) >= ENOUGH and len(history) % TURNS == 1
        for repeat in range(REPEATS):
            if found.tobytes() not in known and (noise or not explores):
                break
            noise = NOISE * 2**repeat
            shaken = costs * np.exp(noise * rng.standard_normal(costs.shape))
            found = allocate(self.problem, shaken)
        return found, {"noise": noise}

    def _indices(self, trial: Trial) -> NDArray[np.int64]:
        params = trial.params
        return np.array(
            [where[params[name]] for name, where in self._positions], dtype=np.int64
        )


def _make(brief: Brief) -> BaseSampler:
    return AllocationSampler(brief)


@hookimpl
def register_samplers() -> list[SamplerFactory]:
    """Return the strategy."""
    return [
        SamplerFactory(
            "allocation",
            _make,
            "the exact optimum of an additive model that every trial corrects",
            needs=frozenset({"sensitivities"}),
            several=False,
        )
    ]
