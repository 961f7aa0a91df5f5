"""Rivals that need no search: the best policies by what choices cost by themselves.

A search earns its time only where it beats them. With pruning and quantization in one
space, each alone is a rival too, at the same budgets.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float

from autoprune.compression.actions import Actions
from autoprune.errors import BudgetError
from autoprune.policy import Action, Policy, Site
from autoprune.searching.allocation import allocate
from autoprune.searching.plan import Plan
from autoprune.searching.problem import Problem, Proposal
from autoprune.searching.rows import Trial
from autoprune.searching.sensitivity import GRADIENTS, Sensitivities

log = logging.getLogger(__name__)

SOLVED = ALLOCATION, QUANTIZATION, PRUNING = "allocation", "quantization", "pruning"
"""Rivals that are solved for, as ``search: {rivals: ...}`` names them."""

UNIFORM, RANDOM = "uniform", "random search"
"""How origins of the others begin."""

RIVALS = (UNIFORM, RANDOM, *(f"{name} only" for name in SOLVED))
"""How origins of all rivals begin: of policies that a search has to beat."""


def rival_kind(origin: str) -> str | None:
    """Tell which kind of rival a trial is, from its origin; None if it is none."""
    return next((kind for kind in RIVALS if origin.startswith(kind)), None)


def solved_rivals(
    plan: Plan,
    measured: Sensitivities,
    tell: Callable[[str], None],
    *,
    known: Float[np.ndarray, "sites choices"] | None = None,
    spare_s: float = math.inf,
) -> list[Proposal]:
    """Solve for the rivals of a plan that need no search, all within its budgets.

    Where the plan asks for a sensitivity of ``GRADIENTS``, every rival is solved for by
    each of them, the plan's own first: a trial tells which one is better here, and the
    search starts from there. A policy that both lead to is given once.

    ``quantization`` and ``pruning`` are left out where choices are of one sort, and
    where nothing of theirs is that small. Without budgets the best policy is dense, so
    there are none.

    Args:
        plan: Of the first round, its variants made.
        measured: What choices cost by themselves.
        tell: Hears what is measured.
        known: The plan's own sensitivity, where the strategy has had it measured.
        spare_s: Seconds that are left for trials. The other sensitivity takes about as
            long as the plan's own, and is left out where that was a tenth of it.
    """
    wanted = [name for name in plan.config.search.rivals if name in SOLVED]
    if not wanted or not plan.problem.budgets:
        return []
    own, costs = plan.config.search.sensitivity, {}
    for kind in dict.fromkeys((own, *(GRADIENTS if own in GRADIENTS else ()))):
        if kind == own and known is not None:
            costs[kind] = known
            continue
        if kind != own and measured.seconds.get(own, 0.0) > spare_s / 10:
            log.info("no time for rivals by %s", kind)
            continue
        tell(f"measuring sensitivities ({kind}), for rivals")
        costs[kind] = measured.costs(kind)
    traits = _Traits(plan.problem, plan.bench.actions)
    found: list[Proposal] = []
    for name in wanted:
        if name != ALLOCATION and not traits.mixed:
            continue  # it is the allocation itself
        allowed, different = traits.allowed(name), dict[Policy, str]()
        try:
            for kind, each in costs.items():
                indices = allocate(plan.problem, np.where(allowed, each, np.inf))
                origin = f"{name} only" + ("" if kind == own else f", by {kind}")
                different.setdefault(plan.problem.space.at(indices), origin)
        except BudgetError as error:
            log.info("no rival %r: %s", f"{name} only", error)
        found += [(origin, policy) for policy, origin in different.items()]
    return found


def random_rival(plan: Plan, trials: int) -> Plan:
    """Plan a random search among the same variants, of at most so many trials."""
    changes = {"sampler": "random", "trials": trials, "rivals": []}
    search = plan.config.search.model_copy(update=changes)
    config = plan.config.model_copy(update={"search": search})
    return replace(plan, config=config, proposals=())


def as_random_rival(trials: Sequence[Trial]) -> list[Trial]:
    """Give the trials of a random search the origin of a rival."""
    return [replace(trial, origin=RANDOM) for trial in trials]


class _Traits:
    """Which choices of a space prune, and which quantize."""

    def __init__(self, problem: Problem, actions: Actions) -> None:
        space = problem.space
        shape = len(space.sites), max(len(c) for c in space.choices.values())
        self._prunes = np.zeros(shape, dtype=bool)
        self._quantizes = np.zeros(shape, dtype=bool)
        for row, site in enumerate(space.sites):
            for column, action in enumerate(space.choices[site.name]):
                prunes, quantizes = _does(actions, site, action)
                self._prunes[row, column] = prunes
                self._quantizes[row, column] = quantizes

    @property
    def mixed(self) -> bool:
        """True if some choices prune and some quantize, or do both."""
        return bool(self._prunes.any() and self._quantizes.any())

    def allowed(self, name: str) -> Bool[np.ndarray, "sites choices"]:
        """Tell which choices a rival may take."""
        if name == QUANTIZATION:
            return ~self._prunes
        if name == PRUNING:
            return ~self._quantizes
        return np.ones_like(self._prunes)


def _does(actions: Actions, site: Site, action: Action) -> tuple[bool, bool]:
    """Tell whether an action removes weights, and whether it quantizes."""
    if not action.steps:
        return False, False
    stored = [actions.storage(layer, action) for layer in site.layers]
    return (
        any(storage.mask is not None for storage in stored),
        any(storage.bits is not None for storage in stored),
    )
