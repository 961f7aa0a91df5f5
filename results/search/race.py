"""The race at 50, 60 and 70 % zeros: AutoPrune's default strategy and EvoPress.

Both search among the same variants (nine levels for each of 210 layers, made on inputs
propagated at the target), with the same 24 windows of 256 tokens of fitness. EvoPress
also runs with its own bank: dense inputs, its own levels.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from arena import Arena
from evopress import OFFSPRING, STAGES, evolve
from setting import REACH, TARGETS, open_own, open_plan, uniform

from autoprune.compression.store import VariantStore
from autoprune.policy import Policy
from autoprune.searching.ledger import Ledger
from autoprune.searching.plan import Plan
from autoprune.searching.rows import Trial
from autoprune.searching.rungs import incumbents
from autoprune.searching.study import run_study

SEEDS = (0, 1, 2)
GENERATIONS = 25
"""Of EvoPress: 450 evaluations, 154 k tokens."""

TRIALS = 24
"""Most trials of our strategy."""

RUNGS = (2048,)


class Clock:
    """CPU seconds of a search, without those of the bookkeeping beside it."""

    def __init__(self) -> None:
        self._began = time.process_time()
        self._left_out = 0.0

    def seconds(self) -> float:
        """Give the seconds so far."""
        return time.process_time() - self._began - self._left_out

    def aside(self, measure: Callable[[], Any]) -> Any:
        """Do something whose time does not count."""
        began = time.process_time()
        found = measure()
        self._left_out += time.process_time() - began
        return found


def ready(plan: Plan) -> Arena:
    """Make the variants and load them, so that searches pay for neither."""
    plan.bank.make(plan.pairs)
    for pair in plan.pairs:
        plan.bank.weight(*pair)
    for split in ("fitness", "choice", "report"):
        plan.bench.teacher(split)
    return Arena(plan)


def resolved(plan: Plan, policy: Policy) -> dict[str, Any]:
    """Solve a policy block by block on its own inputs, and measure it on new text."""
    bench, began = plan.bench, time.process_time()
    bank = bench.bank(policy)
    with tempfile.TemporaryDirectory() as folder:  # empty: all is made now
        bank.store = VariantStore(Path(folder), 10**11)
        bank.make(bench.per_layer(policy).items())
        spent = time.process_time() - began
        found = bench.measure(policy, bank, "report")
    assert found.quality is not None
    return {
        "resolve_cpu_s": spent,
        "report_perplexity": found.metrics["perplexity"],
        "report_kl": found.metrics["kl"],
        "report_kl_error": found.quality.kl_error(),
        "sparsity": found.metrics["sparsity"],
        "dense_perplexity": bench.teacher("report").dense.perplexity,
    }


def ours(target: float, seed: int, **search: Any) -> dict[str, Any]:
    """Run the default strategy from the uniform policy."""
    plan = open_plan(target, rungs=list(RUNGS), seed=seed, **search)
    arena, curve = ready(plan), []
    clock = Clock()

    def on_trial(trial: Trial) -> None:
        cpu = clock.seconds()
        choice = None
        if trial.state == "complete":
            choice = clock.aside(partial(arena.kl, trial.policy, split="choice"))
        curve.append([cpu, trial.values[0], trial.state, choice, len(trial.windows)])

    with tempfile.TemporaryDirectory() as folder:
        with Ledger.open(Path(folder), {}) as ledger:
            ended = run_study(
                plan.problem,
                plan.evaluator(),
                ledger=ledger,
                sampler=plan.strategy,
                objective=plan.objective,
                seed=seed,
                rungs=plan.rungs,
                trials=TRIALS,
                proposals=[("uniform", uniform(plan, target))],
                on_trial=on_trial,
            )
            trials = ledger.trials()
    held = incumbents(trials, plan.objective)
    best = trials[held[-1]]
    return {
        "strategy": plan.strategy.name,
        "target": target,
        "seed": seed,
        "ended": ended,
        "slope_tokens": plan.strategy.slope_tokens,
        "accepted": held,
        "columns": ["cpu_s", "kl", "state", "choice_kl", "windows"],
        "curve": curve,
        "search_cpu_s": clock.seconds(),
        "policy": arena.levels(best.policy).tolist(),
        **resolved(plan, best.policy),
    }


def evopress(target: float, seed: int, *, own: bool = False) -> dict[str, Any]:
    """Run EvoPress from the uniform policy, on the shared bank or on its own."""
    if own:
        plan = open_own(target)
        arena = ready(plan)
        groups = np.zeros(len(arena.free), dtype=np.int64)  # a level weighs the same
        start = arena.at_target(target)
    else:
        plan = open_plan(target)
        arena = ready(plan)
        groups = np.unique(arena.numel, return_inverse=True)[1]
        start = np.full(len(arena.free), REACH)
    clock, curve = Clock(), []

    def score(levels: Any, windows: Any) -> float:
        return arena.kl(arena.policy(levels), windows)

    def note(number: int, evaluations: int, tokens: int, levels: Any) -> None:
        cpu = clock.seconds()
        if number % 5 == 0 or number == 1:
            policy = arena.policy(levels)
            kl = clock.aside(partial(arena.kl, policy))
            choice = clock.aside(partial(arena.kl, policy, split="choice"))
            curve.append([cpu, kl, evaluations, tokens, choice])

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
    return {
        "strategy": "EvoPress, own bank" if own else "EvoPress",
        "target": target,
        "seed": seed,
        "offspring": OFFSPRING,
        "stages": [[stage.survivors, stage.windows] for stage in STAGES],
        "columns": ["cpu_s", "kl", "evaluations", "tokens", "choice_kl"],
        "curve": curve,
        "search_cpu_s": clock.seconds(),
        "policy": parent.tolist(),
        **resolved(plan, arena.policy(parent)),
    }


def plain(target: float) -> dict[str, Any]:
    """Solve the uniform policy block by block."""
    plan = open_plan(target)
    return {"strategy": "uniform", "target": target} | resolved(
        plan, uniform(plan, target)
    )


def bank(target: float, kind: str) -> dict[str, Any]:
    """Time the making of all variants."""
    plan = open_plan(target, bank=kind) if kind != "own" else open_own(target)
    with tempfile.TemporaryDirectory() as folder:
        plan.bank.store = VariantStore(Path(folder), 10**11)
        began = time.process_time()
        made = plan.bank.make(plan.pairs)
        return {"variants": made, "bank_cpu_s": time.process_time() - began}


def cells() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name every cell, the first to be measured first."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in SEEDS:
        for target in reversed(TARGETS):
            shown = f"{target:g}".removeprefix("0.") + "0"
            found[f"ours-{shown}-{seed}"] = partial(ours, target, seed)
            found[f"evopress-{shown}-{seed}"] = partial(evopress, target, seed)
            if not seed:
                found[f"uniform-{shown}"] = partial(plain, target)
                found[f"bank-{shown}"] = partial(bank, target, "uniform")
    found["evopress-own-70-0"] = partial(evopress, 0.7, 0, own=True)
    found["bank-own-70"] = partial(bank, 0.7, "own")
    return found
