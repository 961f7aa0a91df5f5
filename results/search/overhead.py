"""What a proposal costs each strategy, on problems without a model.

The search's own loop runs with a ledger in a temporary folder; the KL is a formula, and
its CPU seconds are taken off. What is left is all that a trial costs beside its
evaluation: proposal, budgets, Optuna's books, the row on disk.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer, Policy, Site
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.ends import Ends
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Objective
from autoprune.searching.problem import Problem
from autoprune.searching.rows import Trial
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.space import SearchSpace
from autoprune.searching.strategies import SamplerFactory
from autoprune.searching.study import run_study
from autoprune.searching.trial import Evaluator, Score

LIMIT_MS = 50.0
"""What a proposal of the default strategy may cost at most."""

DEFAULT = "gradient"

TRIALS = 100
FEW = {"gp": 14, "cmaes": 24}
"""Trials of those that are slow, for the outer knobs only; the others do ``TRIALS``."""

RESTARTS = 8
"""Most searches of a strategy that ends by itself."""

MANY_TRIALS = 40
MANY = ("gradient", "allocation", "evolution")
"""The strategies that are tried at 1000 sites."""

SHAPES = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}
"""The layers of a block of SmolLM2-135M; 30 blocks have 210."""

CHOICES: dict[str, tuple[float, float]] = {
    "dense": (16.0, 0.0),
    **{f"gptq(bits={b}, group=64)": (b + 0.5, 4.0**-b) for b in (8, 6, 5, 4, 3, 2)},
    **{
        f"sparsegpt(sparsity={z}) + gptq(bits={b}, group=64)": (
            (1 - z) * b + 1.5,
            4.0**-b + 0.02 * z**3,
        )
        for z in (0.25, 0.5, 0.75)
        for b in (8, 6, 4)
    },
}
"""16 actions: bits a weight, and damage."""

BUDGET = 0.25
"""Of the dense bytes."""

WINDOWS = 24
RUNGS = (8, WINDOWS)
NOISE = 0.02
"""Spread of what a policy is luckier with on one window than on another."""

INTERPLAY = 0.3
"""How much two neighbours that are both changed make each other worse."""


def make_problem(sites: int) -> Problem:
    """Make sites as of a transformer with 16 actions each, and a budget of bytes."""
    roles = list(SHAPES)
    places = []
    for index in range(sites):
        block, role = index // len(roles), roles[index % len(roles)]
        name = f"model.layers.{block}.{role}"
        layer = Layer(name, SHAPES[role], "bfloat16", block, role, f"{block}.{role}")
        places.append(Site(f"blocks.{block}.{role}", (layer,)))
    actions = tuple(map(Action.parse, CHOICES))
    bytes_each = np.array([bits for bits, _ in CHOICES.values()]) / 8
    space = SearchSpace(tuple(places), {site.name: actions for site in places})
    table = {site.name: np.floor(site.numel * bytes_each) for site in places}
    dense = sum(float(prices[0]) for prices in table.values())
    return Problem(
        space,
        (Prices("size_bytes", table),),
        (Budget("size_bytes", float(round(BUDGET * dense))),),
    )


class Formula(Evaluator):
    """A KL by a formula: damages of sites, and what neighbours add to each other.

    Attributes:
        damage: What every choice does, ``[sites, choices]``.
        cpu_s: CPU seconds that were spent here.
    """

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self._space = problem.space
        rng = np.random.default_rng(seed)
        each = np.array([damage for _, damage in CHOICES.values()])
        sites = len(problem.space.sites)
        weight = rng.lognormal(0, 1, sites) * 60 / sites
        spread = rng.lognormal(0, 0.2, (sites, len(CHOICES)))
        self.damage = weight[:, None] * each * spread
        self._hardness = rng.lognormal(0, 0.3, WINDOWS)
        self.cpu_s = 0.0

    def measure(
        self,
        policy: Policy,
        windows: int | None = None,
        *,
        near: Policy | None = None,
    ) -> Score:
        """Compute the KL of the first windows."""
        began = time.process_time()
        chosen = self._space.index(policy)
        own = self.damage[np.arange(len(chosen)), chosen]
        total = own.sum() + INTERPLAY * np.sqrt(own[1:] * own[:-1]).sum()
        luck = np.random.default_rng(int(policy.fingerprint, 16))
        kl = total * self._hardness * (1 + NOISE * luck.standard_normal(WINDOWS))
        seen = tuple(kl[: windows or WINDOWS].tolist())
        score = Score({"kl": float(np.mean(seen))}, seen)
        self.cpu_s += time.process_time() - began
        return score

    def slopes(
        self, policy: Policy, *, tokens: int, draws: int, turn: int, **_: Any
    ) -> SiteSlopes:
        """Give changes of damage with noise, and a curvature that is half of them."""
        began = time.process_time()
        chosen = self._space.index(policy)
        rows = np.arange(len(chosen))
        moved = self.damage - self.damage[rows, chosen][:, None]
        rng = np.random.default_rng([int(policy.fingerprint, 16), turn])
        noise = 0.3 * np.abs(moved) * rng.standard_normal(moved.shape)
        tables = moved + noise, 0.3 * np.abs(moved), 0.5 * np.abs(moved)
        slope, error, curvature = (table.astype(np.float32) for table in tables)
        self.cpu_s += time.process_time() - began
        return SiteSlopes(slope, error, curvature, tuple(range(8)))


def one_search(
    problem: Problem, factory: SamplerFactory, trials: int, seed: int
) -> dict[str, Any]:
    """Search once; give the milliseconds of every trial, and what was found."""
    evaluator = Formula(problem, seed)
    rng = np.random.default_rng(seed)
    guess = evaluator.damage * rng.lognormal(0, 0.3, evaluator.damage.shape)
    assert problem.projection is not None
    start = problem.space.at(problem.projection.fit(problem.projection.cheapest, rng))
    marks: list[tuple[float, float, float]] = []

    def on_trial(trial: Trial) -> None:
        wall = trial.timings["propose_s"]
        marks.append((time.process_time(), evaluator.cpu_s, wall))

    with tempfile.TemporaryDirectory() as folder:
        with Ledger.open(Path(folder), {}) as ledger:
            ended = run_study(
                problem,
                evaluator,
                ledger=ledger,
                sampler=factory,
                objective=Objective((("kl", "minimize"),)),
                seed=seed,
                rungs=RUNGS,
                sensitivities=guess,
                ends=Ends(trials),
                proposals=[("start", start)],
                on_trial=on_trial,
            )
            found = ledger.trials()
    failed = [trial.error for trial in found if trial.state == "failed"]
    if failed:
        raise AssertionError(f"strategy {factory.name!r}: {failed[0]}")
    best = min(trial.values[0] for trial in found if trial.feasible)
    # The first trial of all is given, not proposed.
    cpu, inside = np.diff(np.array(marks)[:, :2], axis=0).T
    return {
        "ended": ended,
        "spent_ms": (1e3 * (cpu - inside)).tolist(),
        "walls_ms": [1e3 * wall for _, _, wall in marks[1:]],
        "kl": [round(found[0].values[0], 4), round(best, 4)],
    }


def one_strategy(
    problem: Problem, factory: SamplerFactory, trials: int
) -> dict[str, Any]:
    """Tell the CPU milliseconds of a strategy's trials.

    One that ends by itself before so many trials searches again with another seed.
    """
    runs: list[dict[str, Any]] = []
    spent: list[float] = []
    while len(spent) < trials - 1 and len(runs) < RESTARTS:
        runs.append(one_search(problem, factory, trials, seed=len(runs)))
        spent += runs[-1]["spent_ms"]
        if runs[-1]["ended"] != "exhausted":
            break
    last = runs[-1]["spent_ms"]
    return {
        "searches": len(runs),
        "proposals": len(spent),
        "median_ms": round(float(np.median(spent)), 2),
        "mean_ms": round(float(np.mean(spent)), 2),
        "last_ms": round(float(np.mean(last[-max(1, len(last) // 5) :])), 2),
        "worst_ms": round(max(spent), 2),
        "propose_wall_ms": round(float(np.median(runs[0]["walls_ms"])), 2),
        "kl": runs[0]["kl"],
    }


def measure_all(sites: int, trials: Mapping[str, int]) -> dict[str, Any]:
    """Measure strategies, each for its number of trials."""
    problem = make_problem(sites)
    known = load_plugins().objects["samplers"]
    rows = {
        name: one_strategy(problem, known[name], count)
        for name, count in trials.items()
    }
    return {
        "sites": sites,
        "actions": len(next(iter(problem.space.choices.values()))),
        "strategies": rows,
    }


def _usual() -> dict[str, Any]:
    names = sorted(load_plugins().objects["samplers"])
    found = measure_all(210, {name: FEW.get(name, TRIALS) for name in names})
    mean_ms = found["strategies"][DEFAULT]["mean_ms"]
    kept = {"default": DEFAULT, "limit_ms": LIMIT_MS, "kept": mean_ms < LIMIT_MS}
    return kept | found


def cells() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name the cells: all strategies at 210 sites, some at 1000."""
    many = dict.fromkeys(MANY, MANY_TRIALS)
    return {
        "overhead": _usual,
        "overhead-1000": partial(measure_all, 1000, many),
    }
