"""What each part of the search is worth: at 70 % zeros, the same variants and seed.

Searches get the CPU seconds of the default strategy in cell ``ours-70-0``, to which all
is compared. What refinement is worth stands in the cells ``refined-*``.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from arena import Arena
from autoprune_plugins.allocation import AllocationSampler
from race import RUNGS, SEARCH_S
from searched import afresh, judged, ready, search
from setting import open_plan

from autoprune.evaluation.sensitivity import replacement_costs
from autoprune.policy import Action, Layer
from autoprune.searching.plan import Plan
from autoprune.searching.strategies import Brief, SamplerFactory

TARGET, SEED = 0.7, 0

PAIRS = 40
"""Choices that are replaced by themselves with and without reuse of activations."""

PAIR_WINDOWS = 8


def searched(
    plan: Plan, factory: SamplerFactory, *, cpu_s: float = SEARCH_S, **how: Any
) -> dict[str, Any]:
    """Search at 70 % zeros for some CPU seconds."""
    found, policies = search(plan, factory, TARGET, seed=SEED, cpu_s=cpu_s, **how)
    return found | judged(Arena(plan), *policies)


def without_rungs() -> dict[str, Any]:
    """Run the default strategy with every trial on the whole split."""
    plan = open_plan(TARGET, seed=SEED)
    ready(plan)
    return searched(plan, plan.strategy, rungs=())


def without_curvature() -> dict[str, Any]:
    """Run the default strategy on slopes alone."""
    plan = open_plan(TARGET, rungs=list(RUNGS), seed=SEED)
    ready(plan)
    bare = replace(plan.strategy, draws=0)
    return searched(plan, bare)


def tpe() -> dict[str, Any]:
    """Run TPE per site."""
    plan = open_plan(TARGET, rungs=list(RUNGS), seed=SEED, sampler="tpe")
    ready(plan)
    return searched(plan, plan.strategy)


def allocation(refit: bool) -> dict[str, Any]:
    """Run the allocation, its multipliers fitted to the trials or left at 1."""
    plan = open_plan(TARGET, rungs=list(RUNGS), seed=SEED, sampler="allocation")
    ready(plan)
    kind = plan.config.search.sensitivity
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        costs = afresh(plan, Path(folder)).costs(kind)
    prepared = time.process_time() - began
    factory = plan.strategy if refit else replace(plan.strategy, make=_without_refit)
    found = searched(plan, factory, cpu_s=SEARCH_S - prepared, sensitivities=costs)
    return {"refit": refit, "sensitivity": kind, "prepare_cpu_s": prepared} | found


def without_reuse() -> dict[str, Any]:
    """Time ``measured`` sensitivities, with and without reuse of activations."""
    plan = open_plan(TARGET, seed=SEED)
    ready(plan)
    space, teacher = plan.problem.space, plan.bench.teacher("fitness")
    bench, windows = plan.bench, range(PAIR_WINDOWS)
    rng = np.random.default_rng(SEED)
    free = [site for site in space.sites if len(space.choices[site.name]) > 1]
    changes: list[dict[Layer, Action]] = []
    for index in sorted(rng.choice(len(free), PAIRS, replace=False)):
        choices = space.choices[free[index].name]
        action = choices[rng.integers(len(choices))]
        changes.append(dict.fromkeys(free[index].layers, action))
    began = time.process_time()
    reused = list(replacement_costs(plan.bank, teacher, changes, windows))
    between = time.process_time()
    plain = _plain_costs(plan, changes, windows)
    ended = time.process_time()
    bench.stitched.restore()
    return {
        "pairs": PAIRS,
        "windows": PAIR_WINDOWS,
        "with_reuse_cpu_s": between - began,
        "without_reuse_cpu_s": ended - between,
        "times_faster": (ended - between) / (between - began),
        "largest_difference": float(np.abs(np.subtract(reused, plain)).max()),
    }


def cells() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name the cells; all but the last need that of the default strategy."""
    return {
        "ablation-no-rungs": without_rungs,
        "ablation-no-curvature": without_curvature,
        "ablation-refit": partial(allocation, True),
        "ablation-no-refit": partial(allocation, False),
        "ablation-tpe": tpe,
        "ablation-no-reuse": without_reuse,
    }


def _without_refit(brief: Brief) -> AllocationSampler:
    """Make the allocation blind to values.

    It still knows what was tried, so that it moves on by its noise.
    """
    history = [replace(trial, values=()) for trial in brief.history]
    return AllocationSampler(replace(brief, history=history))


def _plain_costs(
    plan: Plan, changes: Sequence[Mapping[Layer, Action]], windows: Sequence[int]
) -> list[float]:
    """Measure each change by a whole pass of the model."""
    teacher, model = plan.bench.teacher("fitness"), plan.bench.stitched.model
    dense = dict.fromkeys(plan.bench.stitched.layers, Action())

    def kl(actions: Mapping[Layer, Action]) -> float:
        plan.bank.put(actions)
        return teacher.measure(model, windows).mean_kl

    before = kl(dense)
    return [kl({**dense, **change}) - before for change in changes]
