"""What each part of the search is worth: at 70 % zeros, the same variants and seed.

Searches get the CPU seconds that the default strategy took in cell ``ours-70-0``, and
their KL is noted by CPU seconds. That cell is also what the first two are compared to.
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
from cells import read_cells
from race import RUNGS, TRIALS, ours
from searched import afresh, judged, ready, resolved, search
from setting import open_plan

from autoprune.evaluation.sensitivity import replacement_costs
from autoprune.policy import Action, Layer
from autoprune.searching.plan import Plan
from autoprune.searching.strategies import Brief, SamplerFactory

TARGET, SEED = 0.7, 0

DEFAULT_CELL = f"ours-70-{SEED}"
"""The whole search, to which all is compared."""

PAIRS = 40
"""Choices that are replaced by themselves with and without reuse of activations."""

PAIR_WINDOWS = 8


def searched(
    plan: Plan, factory: SamplerFactory, cpu_s: float, **how: Any
) -> dict[str, Any]:
    """Search at 70 % zeros for some CPU seconds."""
    found, policies = search(plan, factory, TARGET, seed=SEED, cpu_s=cpu_s, **how)
    return found | judged(Arena(plan), *policies, whole=False)


def without_rungs() -> dict[str, Any]:
    """Run the default strategy with every trial on the whole split."""
    spent = _default()["search_cpu_s"]
    plan = open_plan(TARGET, seed=SEED)
    ready(plan)
    return searched(plan, plan.strategy, spent, rungs=(), trials=TRIALS)


def without_curvature() -> dict[str, Any]:
    """Run the default strategy on slopes alone."""
    spent = _default()["search_cpu_s"]
    plan = open_plan(TARGET, rungs=list(RUNGS), seed=SEED)
    ready(plan)
    bare = replace(plan.strategy, draws=0)
    return searched(plan, bare, spent, trials=TRIALS)


def tpe() -> dict[str, Any]:
    """Run TPE per site."""
    spent = _default()["search_cpu_s"]
    plan = open_plan(TARGET, rungs=list(RUNGS), seed=SEED, sampler="tpe")
    ready(plan)
    return searched(plan, plan.strategy, spent)


def allocation(refit: bool) -> dict[str, Any]:
    """Run the allocation, its multipliers fitted to the trials or left at 1."""
    spent = _default()["search_cpu_s"]
    plan = open_plan(TARGET, rungs=list(RUNGS), seed=SEED, sampler="allocation")
    ready(plan)
    kind = plan.config.search.sensitivity
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        costs = afresh(plan, Path(folder)).costs(kind)
    prepared = time.process_time() - began
    factory = plan.strategy if refit else replace(plan.strategy, make=_without_refit)
    found = searched(plan, factory, spent - prepared, sensitivities=costs)
    return {"refit": refit, "sensitivity": kind, "prepare_cpu_s": prepared} | found


def without_refinement() -> dict[str, Any]:
    """Measure the winner with the variants of the search, and solved anew."""
    won = np.array(_default()["policy"])
    plan = open_plan(TARGET, seed=SEED)
    arena = ready(plan)
    policy = arena.policy(won)
    found = plan.bench.measure(policy, plan.bank, "report")
    assert found.quality is not None
    return {
        "of": DEFAULT_CELL,
        "search_bank": {
            "report_perplexity": found.metrics["perplexity"],
            "report_kl": found.metrics["kl"],
            "report_kl_error": found.quality.kl_error(),
        },
        "refined": resolved(plan, policy),
    }


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
        "ablation-no-refinement": without_refinement,
        "ablation-no-reuse": without_reuse,
    }


def _default() -> Mapping[str, Any]:
    """Read what the whole search did, or do it where that is missing."""
    known = read_cells(DEFAULT_CELL)
    return known[DEFAULT_CELL] if known else ours(TARGET, SEED)


def _without_refit(brief: Brief) -> AllocationSampler:
    """Make the allocation blind to values: it fits complete trials only.

    It still knows what was tried, so that it moves on by its noise.
    """
    history = [replace(trial, state="pruned") for trial in brief.history]
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
