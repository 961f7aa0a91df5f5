"""The race at 50, 60 and 70 % zeros: AutoPrune's default strategy and EvoPress.

Both search among the same variants (nine levels for each of 210 layers, made on inputs
propagated at the target), with the same 16 windows of 256 tokens of fitness. EvoPress
also runs with its own bank: dense inputs, its own levels.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from arena import Arena
from cells import read_cells
from evopress import OFFSPRING, STAGES, evolve
from heuristics import alpha_pruning, owl
from searched import Clock, afresh, judged, ready, refined, resolved, search
from setting import REACH, TARGETS, open_own, open_plan, uniform

from autoprune.compression.store import VariantStore
from autoprune.plugins import load_plugins
from autoprune.searching.allocation import allocate

SEEDS = (0, 1, 2)
GENERATIONS = 30
"""Of EvoPress: 540 evaluations, 184 k tokens."""

NOTED = 5
"""Every so many of them the parent is measured on the whole fitness split, aside."""

SEARCH_S = 350
"""CPU seconds of our search: with the making of its variants (107), solving anew and
mixing (175 in all) no more than the 127, 439 and 82 that EvoPress took with its own
variants, searching and solving anew."""

SEARCHED = ("ours", "evopress", "allocation", "random")
ENDS = ("-0", "allocation-50", "allocation-60", "allocation-70", "random-70")
"""Cells whose winner is solved anew and measured on new text: the first seeds."""

RUNGS = (2048,)

FORMULAS = {"owl": owl, "alpha-pruning": alpha_pruning}


@lru_cache(maxsize=1)
def arena_at(target: float) -> Arena:
    """Give the variants of a target, loaded; kept for the next cell of this process."""
    return ready(open_plan(target, rungs=list(RUNGS)))


def ours(target: float, seed: int) -> dict[str, Any]:
    """Run the default strategy from the uniform policy."""
    arena = arena_at(target)
    plan = arena.plan
    found, policies = search(plan, plan.strategy, target, seed=seed, cpu_s=SEARCH_S)
    return found | judged(arena, *policies)


def rival(name: str, target: float) -> dict[str, Any]:
    """Run another strategy for as long as the default one."""
    arena, factory = arena_at(target), load_plugins().get("samplers", name)
    found, policies = search(arena.plan, factory, target, cpu_s=SEARCH_S)
    return found | judged(arena, *policies)


def allocated(target: float) -> dict[str, Any]:
    """Solve for the best policy by the default sensitivity; no policy is tried."""
    arena = arena_at(target)
    plan, began = arena.plan, time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        costs = afresh(plan, Path(folder)).costs(plan.config.search.sensitivity)
    policy = plan.problem.space.at(allocate(plan.problem, costs))
    found = {
        "strategy": "allocation alone",
        "target": target,
        "sensitivity": plan.config.search.sensitivity,
        "search_cpu_s": time.process_time() - began,
    }
    return found | judged(arena, uniform(plan, target), policy)


def evopress(target: float, seed: int, *, own: bool = False) -> dict[str, Any]:
    """Run EvoPress from the uniform policy, on the shared bank or on its own."""
    if own:
        plan = open_own(target)
        arena = ready(plan)
        groups = np.zeros(len(arena.free), dtype=np.int64)  # a level weighs the same
        start = arena.at_target(target)
    else:
        arena = arena_at(target)
        plan = arena.plan
        groups = np.unique(arena.numel, return_inverse=True)[1]
        start = np.full(len(arena.free), REACH)
    clock, curve = Clock(), []

    def score(levels: Any, windows: Any) -> float:
        return arena.kl(arena.policy(levels), windows)

    def note(number: int, evaluations: int, tokens: int, levels: Any) -> None:
        cpu = clock.seconds()
        if number % NOTED == 0:
            kl = clock.aside(partial(arena.kl, arena.policy(levels)))
            curve.append([cpu, kl, evaluations, tokens])

    note(0, 0, 0, start)
    parent = start
    for generation in evolve(
        start,
        groups,
        arena.highest,
        score,
        windows=len(plan.bench.splits["fitness"].ids),
        window_tokens=plan.bench.splits["fitness"].ids.shape[1],
        generations=GENERATIONS,
        seed=seed,
    ):
        parent = generation.parent
        note(generation.number, generation.evaluations, generation.tokens, parent)
    spent = clock.seconds()
    return {
        "strategy": "EvoPress, own bank" if own else "EvoPress",
        "target": target,
        "seed": seed,
        "offspring": OFFSPRING,
        "stages": [[stage.survivors, stage.windows] for stage in STAGES],
        "columns": ["cpu_s", "kl", "evaluations", "tokens"],
        "curve": curve,
        "search_cpu_s": spent,
        **judged(
            arena,
            arena.policy(start),
            arena.policy(parent),
        ),
    }


def refine(name: str, target: float) -> dict[str, Any]:
    """Solve the winner of another cell anew, and keep the better of the two."""
    known = read_cells(name).get(name)
    if known is None:
        sys.exit(f"cell {name} has to be measured before refined-{name}")
    own = name.startswith("evopress-own")
    arena = ready(open_own(target)) if own else arena_at(target)
    policy = arena.policy(np.array(known["policy"]))
    return {"of": name, "target": target} | refined(arena.plan, policy)


def formula(name: str, target: float) -> dict[str, Any]:
    """Take the zeros of every block from a formula; nothing is searched."""
    plan = arena_at(target).plan
    began = time.process_time()
    policy = FORMULAS[name](plan, target)
    spent = time.process_time() - began
    return {"strategy": name, "target": target, "search_cpu_s": spent} | resolved(
        plan, policy
    )


def plain(target: float) -> dict[str, Any]:
    """Solve the uniform policy block by block."""
    plan = open_plan(target)
    return {"strategy": "uniform", "target": target} | resolved(
        plan, uniform(plan, target)
    )


def bank(target: float, kind: str) -> dict[str, Any]:
    """Time the making of all variants; they stay in the store for other cells."""
    plan = open_plan(target, bank=kind) if kind != "own" else open_own(target)
    with ExitStack() as stack:
        if len(plan.bank.missing(plan.pairs)) < len(plan.pairs):  # some are made
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            plan.bank.store = VariantStore(Path(folder), 10**11)
        began = time.process_time()
        made = plan.bank.make(plan.pairs)
        return {"variants": made, "bank_cpu_s": time.process_time() - began}


def shown(target: float) -> str:
    """Write a share of zeros as cells name it."""
    return f"{100 * target:.0f}"


def cells() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name every cell, the first to be measured first."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for target in reversed(TARGETS):
        name = shown(target)
        for seed in SEEDS:
            found[f"ours-{name}-{seed}"] = partial(ours, target, seed)
            found[f"evopress-{name}-{seed}"] = partial(evopress, target, seed)
        for formula_name in FORMULAS:
            found[f"{formula_name}-{name}"] = partial(formula, formula_name, target)
        found[f"allocation-{name}"] = partial(allocated, target)
        found[f"uniform-{name}"] = partial(plain, target)
        found[f"bank-{name}"] = partial(bank, target, "uniform")
    found["bank-own-70"] = partial(bank, 0.7, "own")
    found["evopress-own-70-0"] = partial(evopress, 0.7, 0, own=True)
    found["random-70"] = partial(rival, "random", 0.7)
    for name in [n for n in found if n.startswith(SEARCHED) and n.endswith(ENDS)]:
        target = next(t for t in TARGETS if f"-{shown(t)}" in name)
        found[f"refined-{name}"] = partial(refine, name, target)
    return found
