"""What cells of the search benchmark share: a search by the clock, and its judges."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arena import Arena
from jaxtyping import Float
from setting import uniform

from autoprune.compression.bank import VariantBank
from autoprune.compression.store import VariantStore
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import Policy
from autoprune.searching.ends import Ends
from autoprune.searching.ledger import Ledger
from autoprune.searching.mixing import mixes
from autoprune.searching.plan import Plan
from autoprune.searching.rows import Trial
from autoprune.searching.rungs import incumbents
from autoprune.searching.sensitivity import Sensitivities
from autoprune.searching.strategies import SamplerFactory
from autoprune.searching.study import run_study


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
    plan.bench.teacher("fitness")
    return Arena(plan)


def resolved(plan: Plan, policy: Policy) -> dict[str, Any]:
    """Solve a policy block by block on its own inputs, and measure it on new text."""
    bench, began = plan.bench, time.process_time()
    with _solved(plan, policy) as bank:
        spent = time.process_time() - began
        return {"resolve_cpu_s": spent, **_reported(bench, policy, bank)}


def refined(plan: Plan, policy: Policy) -> dict[str, Any]:
    """Solve a policy anew, mix, and keep what is best on the choice split, as runs do.

    What a search gains on its own variants is partly theirs: solved anew, some of it
    is lost. All are measured on new text; ``report_*`` is of the one that is kept.
    """
    bench, began = plan.bench, time.process_time()
    with _solved(plan, policy) as bank:
        banks, choice = {"searched": plan.bank, "solved": bank}, dict[str, float]()

        def choose() -> None:
            for name in banks.keys() - choice.keys():
                found = bench.measure(policy, banks[name], "choice")
                choice[name] = found.metrics["kl"]

        choose()
        start, other = (banks[name] for name in sorted(banks, key=choice.__getitem__))
        for mixed, sites in mixes(bench, policy, start, other):
            banks[f"mixed, {len(sites)} exchanged"] = mixed
        choose()
        spent = time.process_time() - began
        report = {name: _reported(bench, policy, one) for name, one in banks.items()}
    kept = min(choice, key=choice.__getitem__)
    return {
        "refine_cpu_s": spent,
        "kept": kept,
        "choice_kl_of": choice,
        "report_perplexity_of": {
            name: one["report_perplexity"] for name, one in report.items()
        },
        **report[kept],
    }


@contextmanager
def _solved(plan: Plan, policy: Policy) -> Iterator[VariantBank]:
    """Make the variants of a policy on its own inputs, all of them now."""
    bank = plan.bench.bank(policy)
    with tempfile.TemporaryDirectory() as folder:
        bank.store = VariantStore(Path(folder), 10**11)
        bank.make(plan.bench.per_layer(policy).items())
        yield bank


def _reported(bench: Workbench, policy: Policy, bank: VariantBank) -> dict[str, Any]:
    """Measure a policy on text that no search saw."""
    found = bench.measure(policy, bank, "report")
    assert found.quality is not None
    return {
        "report_perplexity": found.metrics["perplexity"],
        "report_kl": found.metrics["kl"],
        "report_kl_error": found.quality.kl_error(),
        "sparsity": found.metrics["sparsity"],
        "dense_perplexity": bench.teacher("report").dense.perplexity,
    }


def search(
    plan: Plan,
    factory: SamplerFactory,
    target: float,
    *,
    seed: int = 0,
    rungs: tuple[int, ...] | None = None,
    trials: int | None = None,
    cpu_s: float = np.inf,
    sensitivities: Float[np.ndarray, "sites choices"] | None = None,
) -> tuple[dict[str, Any], tuple[Policy, Policy]]:
    """Search from the uniform policy.

    Args:
        plan: The plan, ready.
        factory: The strategy.
        target: Zeros over weights in the blocks.
        seed: Of the search.
        rungs: Windows at which a trial may end; None for the plan's.
        trials: Most trials; None for no end.
        cpu_s: No trial begins after so many CPU seconds, but for the first proposal.
        sensitivities: What choices cost by themselves; their making is not timed here.

    Returns:
        What is recorded, and the policies that it began and ended with.
    """
    clock = Clock()
    curve: list[list[Any]] = []

    def on_trial(trial: Trial) -> None:
        value = trial.values[0] if trial.values else None
        curve.append([clock.seconds(), value, trial.state, len(trial.windows)])

    with tempfile.TemporaryDirectory() as folder:
        with Ledger.open(Path(folder), {}) as ledger:
            ended = run_study(
                plan.problem,
                plan.evaluator(seed),
                ledger=ledger,
                sampler=factory,
                objective=plan.objective,
                seed=seed,
                rungs=plan.rungs if rungs is None else rungs,
                sensitivities=sensitivities,
                proposals=[("uniform", uniform(plan, target))],
                on_trial=on_trial,
                ends=Ends(
                    trials, stop=lambda: len(curve) > 1 and clock.seconds() >= cpu_s
                ),
            )
            found = ledger.trials()
    spent = clock.seconds()
    held = incumbents(found, plan.objective)
    best = found[held[-1]]
    return {
        "strategy": factory.name,
        "target": target,
        "seed": seed,
        "ended": ended,
        "trials": len(found),
        "accepted": held,
        "columns": ["cpu_s", "kl", "state", "windows"],
        "curve": curve,
        "search_cpu_s": spent,
        "kl": best.values[0],
    }, (found[0].policy, best.policy)


def judged(arena: Arena, start: Policy, found: Policy) -> dict[str, Any]:
    """Measure the start and the result of a search on text that it did not see."""
    return {
        "start_choice_kl": arena.kl(start, split="choice"),
        "choice_kl": arena.kl(found, split="choice"),
        "policy": arena.levels(found).tolist(),
    }


def afresh(plan: Plan, cache: Path) -> Sensitivities:
    """Give sensitivities that read nothing which an earlier run has left."""
    store = VariantStore(cache / "variants", plan.bench.store.cap_bytes)
    bench = replace(plan.bench, store=store)
    return Sensitivities(bench, plan.bank, plan.problem.space)
