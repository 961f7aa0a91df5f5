"""A problem on disk, so that another budget is solved for without loading a model."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from autoprune.errors import BudgetError, ConfigError, RunError, unknown_name
from autoprune.evaluation.metric import Evidence
from autoprune.evaluation.workbench import Workbench
from autoprune.limits import Limit
from autoprune.policy import Action, Layer, Site
from autoprune.searching.budget import Budget, Prices, prices_of
from autoprune.searching.formulate import is_additive, prices_in
from autoprune.searching.problem import Problem
from autoprune.searching.space import SearchSpace
from autoprune.sites import Cut

FILE = "problem.json"
"""Name of the file in a run folder."""


@dataclass(frozen=True, eq=False)
class FrozenProblem:
    """The space of a run with the prices of every additive metric.

    Attributes:
        problem: Space and prices, without budgets.
        scales: By metric: its dense value, and the line ``a * limit + b`` that turns a
            limit into a largest sum of prices.
        costs: What every choice costs in KL by itself, if it was measured.
    """

    problem: Problem
    scales: Mapping[str, tuple[float, float, float]]
    costs: Float[np.ndarray, "sites choices"] | None = None

    @classmethod
    def of(
        cls,
        bench: Workbench,
        space: SearchSpace,
        costs: Float[np.ndarray, "sites choices"] | None,
    ) -> "FrozenProblem":
        """Price a space in every metric whose limit is a line of its prices."""
        scene, scales, prices = bench.scene(), {}, []
        for name in bench.metrics:
            if not is_additive(bench, name):
                continue
            metric = bench.metric(name)
            low, middle, high = (metric.total_limit(x, scene) for x in (0.25, 0.5, 1.0))
            if not math.isclose(middle - low, (high - low) / 3, rel_tol=1e-9):
                continue  # a ratio: its limit is no line
            dense = metric.measure(Evidence(scene, scene.dense_storages))
            slope = (high - low) / 0.75
            scales[name] = (dense, slope, high - slope)
            prices.append(prices_in(bench, space, metric))
        return cls(Problem(space, tuple(prices)), scales, costs)

    def within(self, limits: Mapping[str, Limit]) -> Problem:
        """Give the problem with budgets.

        Raises:
            ConfigError: If a metric is unknown, or limited relative to a dense 0.
            BudgetError: If no policy of the space is within one of them.
        """
        budgets = []
        for name, limit in limits.items():
            if name not in self.scales:
                raise ConfigError(unknown_name("additive metric", name, self.scales))
            dense, slope, offset = self.scales[name]
            if limit.relative and dense == 0:
                raise ConfigError(
                    f"the budget of {name} is {limit}, but the dense model's {name} is "
                    "0; give an absolute limit"
                )
            total = slope * limit.absolute(dense) + offset
            self._check_reach(name, total, limit.absolute(dense))
            budgets.append(Budget(name, total))
        return Problem(self.problem.space, self.problem.prices, tuple(budgets))

    def _check_reach(self, metric: str, total: float, asked: float) -> None:
        """Refuse a budget that no policy meets, in the metric's own unit."""
        prices = prices_of(metric, self.problem.prices)
        lowest, _ = prices.reach(self.problem.space)
        if lowest <= total:
            return
        dense, slope, _ = self.scales[metric]
        raise BudgetError(
            f"no policy of the space meets the budget {metric} "
            f"{'<=' if slope > 0 else '>='} {asked:.6g}; the best that its actions "
            f"reach is {self.value(metric, lowest):.6g} (dense: {dense:.6g}). Relax "
            "the budget, or search a space with stronger actions"
        )

    def value(self, metric: str, total: float) -> float:
        """Turn a sum of prices into the metric's value."""
        _, slope, offset = self.scales[metric]
        return (total - offset) / slope

    def write(self, folder: Path) -> None:
        """Write it into a run folder, whole or not at all.

        Raises:
            RunError: If it cannot be written.
        """
        space, costs = self.problem.space, self.costs
        data = {
            "sites": [asdict(site) for site in space.sites],
            "choices": {
                site: [str(action) for action in actions]
                for site, actions in space.choices.items()
            },
            "prices": {
                entry.metric: {site: own.tolist() for site, own in entry.table.items()}
                for entry in self.problem.prices
            },
            "scales": dict(self.scales),
            # JSON has no infinity: where a site has no such choice stands null.
            "costs": None
            if costs is None
            else [[x if math.isfinite(x) else None for x in row] for row in costs],
        }
        part = folder / f"{FILE}.{os.getpid()}.part"
        try:
            part.write_text(json.dumps(data), encoding="utf-8")
            os.replace(part, folder / FILE)
        except OSError as error:
            raise RunError(f"cannot write {folder / FILE}: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> "FrozenProblem":
        """Read it from a run folder.

        Raises:
            RunError: If it is not there or damaged.
        """
        path = folder / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls._from(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"cannot read {path}: {error}. It is written when a search begins: "
                "give the same search command again"
            ) from error

    @classmethod
    def _from(cls, data: Mapping[str, Any]) -> "FrozenProblem":
        sites = tuple(_site(one) for one in data["sites"])
        choices = {
            site: tuple(Action.parse(text) for text in texts)
            for site, texts in data["choices"].items()
        }
        prices = tuple(
            Prices(name, {site: np.array(own) for site, own in table.items()})
            for name, table in data["prices"].items()
        )
        costs = data["costs"]
        if costs is not None:
            costs = np.array(
                [[np.inf if x is None else x for x in row] for row in costs]
            )
        scales = {name: (a, b, c) for name, (a, b, c) in data["scales"].items()}
        return cls(Problem(SearchSpace(sites, choices), prices), scales, costs)


def _site(data: Mapping[str, Any]) -> Site:
    layers = []
    for one in data["layers"]:
        cuts = {name: one.get(name) for name in ("cut", "hidden")}
        known = {name: Cut(**cut) for name, cut in cuts.items() if cut}
        layers.append(Layer(**one | {"shape": tuple(one["shape"])} | known))
    return Site(data["name"], tuple(layers), data["kind"])
