"""The strategies that Optuna brings: random, NSGA-II and TPE."""

from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler

from autoprune.hookspecs import hookimpl
from autoprune.searching.strategies import Brief, SamplerFactory

POPULATION = 12
"""Individuals a generation with one objective: some 300 trials are all there is, and
25 small generations find more than Optuna's 6 of 50 (measured)."""

FRONT = 32
"""Individuals a generation with several objectives: they have to span the front."""

CHANGES = 4
"""Sites in which TPE leaves a good policy. Each kernel of its density redraws a third
to a half of 100 categorical sites, so its whole proposals lie far from all it knows."""


def _random(brief: Brief) -> BaseSampler:
    return RandomSampler(seed=brief.seed)


def _nsga2(brief: Brief) -> BaseSampler:
    population = POPULATION if brief.objectives == 1 else FRONT
    return NSGAIISampler(population_size=population, seed=brief.seed)


def _tpe(brief: Brief) -> BaseSampler:
    # Joint, as Optuna chooses by itself for one objective only: with several it would
    # go site by site, six times slower.
    return TPESampler(multivariate=True, constant_liar=False, seed=brief.seed)


@hookimpl
def register_samplers() -> list[SamplerFactory]:
    """Return the strategies."""
    return [
        SamplerFactory("random", _random, "independent draws: the plain rival"),
        SamplerFactory("nsga2", _nsga2, "evolution; several objectives, many sites"),
        SamplerFactory(
            "tpe", _tpe, "density of good policies over that of bad ones", CHANGES
        ),
    ]
