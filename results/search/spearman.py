"""How well each sensitivity ranks whole policies by the KL that they really have.

64 random policies that all cost the same: random levels, moved on to the budget. The
true KL is taken on the last windows of the fitness split; predictors that look at text
see its first windows, so that none is judged on what it was made from.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from arena import Arena
from numpy.typing import NDArray
from scipy.stats import spearmanr
from setting import open_plan

from autoprune.compression.store import VariantStore
from autoprune.config import RunConfig
from autoprune.plugins import load_plugins
from autoprune.searching.plan import Plan
from autoprune.searching.sensitivity import Sensitivities
from autoprune.searching.space import SearchSpace

POLICIES = 64

TARGETS = (0.3, 0.5, 0.6, 0.7)

BITS = "gptq(bits=[3, 4, 5, 6, 7, 8], group=64)"
BITS_BUDGET = 5.0
"""Bits a weight of the mixed policies, scales included."""

TRUE_WINDOWS = 8
"""Windows that the true KL is taken on, the last of the split."""

FISHER_WINDOWS, FISHER_DRAWS = 8, 4

MEASURED_WINDOWS = 2
MEASURED_STRIDE = 2
"""Every second level is replaced by itself; the others lie between two that were."""

SLOPE_TOKENS = 2048

FAILS = 0.6
"""A predictor below this correlation is said to fail."""

Numbers = NDArray[np.float64]
Rows = NDArray[np.int64]


class Predictors:
    """What each predictor says of policies, and its CPU seconds.

    Args:
        plan: The plan, all of whose variants are made.
        cache: An empty folder: sensitivities that an earlier run has left in the
            user's would cost nothing here.
        rows: The choices of the policies, ``[policies, sites]``.

    Attributes:
        said: What each predictor says of every policy, by its name.
        cpu_s: CPU seconds of what each is made from.
    """

    def __init__(self, plan: Plan, cache: Path, rows: Rows) -> None:
        bench = plan.bench
        store = VariantStore(cache / "variants", bench.store.cap_bytes)
        self._plan, self._rows = plan, rows
        self._sensitivities = Sensitivities(
            replace(bench, store=store),
            plan.bank,
            plan.problem.space,
            windows=FISHER_WINDOWS,
            draws=FISHER_DRAWS,
        )
        self.said: dict[str, Numbers] = {}
        self.cpu_s: dict[str, float] = {}

    def ask_all(self) -> None:
        """Ask every predictor."""
        with self._timed("error"):
            self.said["error"] = self._sum(self._sensitivities.costs("error"))
        with self._timed("fisher", "fisher whole"):
            found = self._sensitivities.fisher_rows()
            self.said["fisher"] = self._sum(found.costs())
            self.said["fisher whole"] = found.predict_many(self._rows)
        with self._timed("measured"):
            self.said["measured"] = self._sum(self._measured())
        assert self._plan.reference is not None
        with self._timed("slopes", "slopes + curvature"):
            slopes = self._plan.evaluator().slopes(
                self._plan.reference, tokens=SLOPE_TOKENS, draws=1, turn=0
            )
            linear = self._sum(slopes.slope)
            self.said["slopes"] = linear
            self.said["slopes + curvature"] = linear + self._sum(slopes.curvature)

    def _sum(self, costs: NDArray[Any]) -> Numbers:
        total: Numbers = costs[np.arange(len(costs)), self._rows].sum(1, dtype=float)
        return total

    def _measured(self) -> Numbers:
        """Replace every second level of the dense model, and lay lines between."""
        space = self._plan.problem.space
        kept = {name: _every_second(len(own)) for name, own in space.choices.items()}
        fewer = SearchSpace(
            space.sites,
            {n: tuple(own[i] for i in kept[n]) for n, own in space.choices.items()},
        )
        some = replace(self._sensitivities, space=fewer, windows=MEASURED_WINDOWS)
        found = some.costs("measured")
        width = max(len(own) for own in space.choices.values())
        costs = np.full((len(space.sites), width), np.inf)
        for row, site in enumerate(space.sites):
            at, count = kept[site.name], len(space.choices[site.name])
            costs[row, :count] = np.interp(range(count), at, found[row, : len(at)])
        return costs

    @contextmanager
    def _timed(self, *names: str) -> Iterator[None]:
        began = time.process_time()
        yield
        spent = time.process_time() - began
        self.cpu_s |= dict.fromkeys(names, round(spent, 1))


def draw(plan: Plan, count: int) -> Rows:
    """Draw choices for policies that all cost the same."""
    space, projection = plan.problem.space, plan.problem.projection
    assert projection is not None
    rng = np.random.default_rng(0)
    counts = [len(space.choices[site.name]) for site in space.sites]
    return np.stack([projection.fit(rng.integers(counts), rng) for _ in range(count)])


def correlate(open_it: Callable[[], Plan], policies: int = POLICIES) -> dict[str, Any]:
    """Rank random policies by each predictor and by their true KL.

    Args:
        open_it: Opens the plan.
        policies: How many.
    """
    plan = open_it()
    plan.bank.make(plan.pairs)
    for pair in plan.pairs:  # so that no predictor pays for reading the disk
        plan.bank.weight(*pair)
    rows = draw(plan, policies)
    total = len(plan.bench.teacher("fitness").windows.ids)
    seen = range(total - TRUE_WINDOWS, total)
    began, arena = time.process_time(), Arena(plan)
    true = [arena.kl(plan.problem.space.at(row), seen) for row in rows]
    kl_cpu_s = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        asked = Predictors(plan, Path(folder), rows)
        asked.ask_all()
    rho = {
        name: round(float(spearmanr(said, true).statistic), 3)
        for name, said in asked.said.items()
    }
    budget = plan.problem.budgets[0]
    return {
        "policies": policies,
        "budget": budget.metric,
        "space_choices": max(map(len, plan.problem.space.choices.values())),
        "rho": rho,
        "fails": [name for name, value in rho.items() if not value >= FAILS],
        "cpu_s": asked.cpu_s,
        "windows": {
            "true": TRUE_WINDOWS,
            "fisher": FISHER_WINDOWS,
            "fisher_draws": FISHER_DRAWS,
            "measured": MEASURED_WINDOWS,
            "slope_tokens": SLOPE_TOKENS,
        },
        "measured_levels": f"1 of {MEASURED_STRIDE} and the last, others between",
        "kl_cpu_s": round(kl_cpu_s, 1),
        "kl": [round(kl, 5) for kl in true],
        "said": {
            name: [float(f"{value:.5g}") for value in said]
            for name, said in asked.said.items()
        },
    }


def open_bits() -> Plan:
    """Load the model with 3 to 8 bits for every site, fused ones together."""
    config = open_plan(TARGETS[-1]).config.model_dump(mode="json")
    config |= {
        "fuse": True,
        "space": [{"actions": [BITS]}],
        "objective": {"metric": "kl", "budgets": {"bits_per_weight": BITS_BUDGET}},
    }
    return Plan.make(RunConfig.from_dict(config), load_plugins())


def cells() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name the cells: one a sparsity, and one for mixed bits."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"spearman-{target:.0%}".removesuffix("%"): partial(
            correlate, partial(open_plan, target)
        )
        for target in TARGETS
    }
    return found | {"spearman-bits": partial(correlate, open_bits)}


def _every_second(count: int) -> list[int]:
    return sorted({*range(0, count, MEASURED_STRIDE), count - 1})
