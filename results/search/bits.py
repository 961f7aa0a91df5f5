"""Cells of mixed bits, and of pruning and quantization at equal bytes.

Layers that runtimes fuse share one action. A budget is in stored bits a weight of the
blocks: scales, zero points and masks count, so uniform 3-bit GPTQ has 3.3.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cell, read_cells, tell
from race import RUNGS
from rivals import autoquantize_costs, autoscheme_costs
from searched import ready
from setting import open_space

from autoprune.config import RunConfig
from autoprune.run import find_space
from autoprune.searching.allocation import allocate
from autoprune.searching.ends import Ends
from autoprune.searching.finals import (
    Candidate,
    elect,
    rank,
    resolve_anew,
    take_candidates,
)
from autoprune.searching.ledger import Ledger
from autoprune.searching.plan import Plan
from autoprune.searching.rivals import UNIFORM, solved_rivals
from autoprune.searching.sensitivity import Sensitivities
from autoprune.searching.study import run_study

BITS = ["gptq(bits=[2, 3, 4, 5, 6, 8], group=64)"]
PRUNING = ["sparsegpt(sparsity=[0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9])"]
JOINT = RunConfig.from_yaml(find_space("joint")).space[0].actions

TRIALS = 8
"""Most trials of our strategy, beside the rivals that it starts from."""

FINALISTS = 4
"""Compared on the choice split, as runs do by default."""

SCORES = {"autoquantize": autoquantize_costs, "autoscheme": autoscheme_costs}


def cells() -> dict[str, Cell]:
    """Name every cell, the first to be measured first."""
    found: dict[str, Cell] = {}
    for limit in (3.0, 3.5):
        found[f"bits-{limit}-uniform"] = partial(uniform, limit)
        found[f"bits-{limit}-gradient"] = partial(gradient, BITS, limit)
        for name in SCORES:
            found[f"bits-{limit}-{name}"] = partial(scored, name, limit)
    for limit in (3.0, 3.5, 4.0):
        found[f"joint-{limit}-joint"] = partial(gradient, JOINT, limit)
        bits = partial(gradient, BITS, limit)
        found[f"joint-{limit}-bits"] = partial(again, f"bits-{limit}-gradient", bits)
        found[f"joint-{limit}-pruning"] = partial(gradient, PRUNING, limit)
    return found


def uniform(limit: float) -> dict[str, Any]:
    """Take the best of the uniform policies and the mixes that meet a budget."""
    plan, began = _open(BITS, limit), time.process_time()
    evaluator = plan.evaluator()
    rivals = [
        Candidate(number, origin, policy, evaluator.measure(policy).metrics)
        for number, (origin, policy) in enumerate(plan.proposals)
        if origin.startswith(UNIFORM)
    ]
    best = min(rivals, key=lambda rival: rival.fitness["kl"])
    return _measured(plan, [best], began)


def gradient(actions: list[str], limit: float) -> dict[str, Any]:
    """Search with the default strategy, from the best rival, as runs do."""
    plan, began = _open(actions, limit), time.process_time()
    measured = Sensitivities(plan.bench, plan.bank, plan.problem.space)
    proposals = [*plan.proposals, *solved_rivals(plan, measured, tell)]
    prepared = time.process_time() - began
    with (
        tempfile.TemporaryDirectory() as folder,
        Ledger.open(Path(folder), plan.fingerprint) as ledger,
    ):
        ended = run_study(
            plan.problem,
            plan.evaluator(),
            ledger=ledger,
            sampler=plan.strategy,
            objective=plan.objective,
            seed=plan.config.search.seed,
            rungs=plan.rungs,
            ends=Ends(len(proposals) + TRIALS),
            proposals=proposals,
        )
        trials = ledger.trials()
    best = take_candidates(trials, plan.objective, count=FINALISTS)
    return {
        "strategy": plan.strategy.name,
        "ended": ended,
        "rivals_cpu_s": prepared,
        "columns": ["origin", "state", "kl"],
        "trials": [[trial.origin, trial.state, trial.values[0]] for trial in trials],
        **_measured(plan, best, began),
    }


def scored(name: str, limit: float) -> dict[str, Any]:
    """Solve for the best policy by the scores of a rival; no policy is tried."""
    plan, began = _open(BITS, limit), time.process_time()
    teacher = plan.bench.teacher("fitness")
    windows = range(len(teacher.windows.ids))
    costs = SCORES[name](plan.bank, teacher, plan.problem.space, windows)
    policy = plan.problem.space.at(allocate(plan.problem, costs))
    metrics = plan.evaluator().measure(policy).metrics
    return _measured(plan, [Candidate(0, name, policy, metrics)], began)


def again(name: str, measure: Cell) -> dict[str, Any]:
    """Show a cell under a second name; measure it where it is not there yet."""
    known = read_cells(name).get(name)
    if known is None:
        return measure()
    own = {"cell": name, "cell_cpu_s": known["cell_cpu_s"]}
    return {"same_as": own} | {k: v for k, v in known.items() if k not in own}


def _open(actions: list[str], limit: float) -> Plan:
    """Open a plan with all variants made, so that no search pays for them."""
    rules = [{"actions": actions}]
    plan = open_space(rules, {"bits_per_weight": limit}, rungs=list(RUNGS))
    ready(plan)
    return plan


def _measured(plan: Plan, candidates: list[Candidate], began: float) -> dict[str, Any]:
    """Choose as runs do, and measure on new text.

    The elected finalist and the best rival are solved on their own inputs and mixed
    where that helps; the better one on the choice split is kept.
    """
    searched = time.process_time() - began
    bench, cost = plan.bench, plan.cost("choice")
    ranked = rank(bench, plan.bank, candidates, cost, basis=plan.reference)
    elected, rival = elect(ranked, cost)
    two = [elected, *([rival] if rival and rival is not elected else [])]
    refined = [resolve_anew(bench, one, cost) for one in two]
    finalist = min(refined, key=lambda one: cost(one.choice))
    refining = time.process_time() - began - searched
    candidate = finalist.candidate
    found = bench.measure(candidate.policy, finalist.bank, "report")
    assert found.quality is not None
    nll, perplexity = found.quality.nll.double(), found.metrics["perplexity"]
    return {
        "origin": candidate.origin,
        "search_cpu_s": searched,
        "refine_cpu_s": refining,
        "resolved": finalist.resolved,
        "mixed_sites": len(finalist.mix.sites) if finalist.mix else 0,
        "choice_kl_of": {
            one.candidate.origin: one.choice.metrics["kl"] for one in refined
        },
        "fitness_kl": candidate.fitness["kl"],
        "choice_kl": finalist.choice.metrics["kl"],
        "report_perplexity": perplexity,
        # To first order: the exponential of a mean has its error times itself.
        "report_perplexity_error": perplexity * float(nll.std()) / len(nll) ** 0.5,
        "report_kl": found.metrics["kl"],
        "report_kl_error": found.quality.kl_error(),
        "dense_perplexity": bench.teacher("report").dense.perplexity,
        "bits_per_weight": found.metrics["bits_per_weight"],
        "size_bytes": found.metrics["size_bytes"],
        "sparsity": found.metrics["sparsity"],
        "policy": {site: str(action) for site, action in candidate.policy.items()},
    }
