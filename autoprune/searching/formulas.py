"""Formulas that give every layer a ratio of zeros, and the levels that they land on."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from autoprune.errors import BudgetError, ConfigError
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import DENSE, Action, Layer, Policy
from autoprune.searching.budget import prices_of
from autoprune.searching.problem import Problem, Proposal
from autoprune.searching.projection import Projection
from autoprune.searching.proposer import Proposer

BISECTIONS = 40
"""Halvings of the interval that holds the ratio which meets the budget."""

EPSILON = 0.3
"""How far ratios may lie from the target, as a share of it: the upper end of the 0.2 to
0.3 that AlphaPruning uses."""

Family = tuple[tuple[str, tuple[tuple[str, object], ...]], ...]
"""Steps of an action, without their sparsity."""


@dataclass(frozen=True, eq=False)
class Ladder:
    """The levels of one family of sparsities, and what becomes of ratios on them.

    A family is an action with several values of ``sparsity``; dense is the level of no
    zeros where nothing else is done to the weights.

    Attributes:
        problem: What may be chosen, and the budgets; the first decides the ratio.
        zeros: Ratio of zeros of every choice; inf where it is no level.
        target: Mean ratio that the formulas aim at.
    """

    problem: Problem
    zeros: Float[np.ndarray, "sites choices"]
    target: float = field(default=0.0, kw_only=True)

    @classmethod
    def of(cls, problem: Problem, target: float | None = None) -> "Ladder":
        """Find the family with the most levels over all sites in blocks.

        Args:
            problem: What may be chosen, with at least one budget.
            target: Mean ratio of zeros; by default the one that, given to every layer,
                just meets the first budget.

        Raises:
            ConfigError: If there is no budget, or no site offers two levels.
        """
        if not problem.budgets:
            raise ConfigError(
                "a formula divides a budget among the layers, found no budget. Give "
                "objective: budgets, such as {size_bytes: 50%}"
            )
        counts: dict[Family, int] = {}
        for _, _, action in _choices(problem):
            if (level := _level(action)) is not None:
                counts[level[0]] = counts.get(level[0], 0) + 1
        best = max(counts, key=lambda family: counts[family], default=None)
        width = max(len(actions) for actions in problem.space.choices.values())
        zeros = np.full((len(problem.space.sites), width), np.inf)
        for row, column, action in _choices(problem):
            level = _level(action)
            if level is not None and level[0] == best:
                zeros[row, column] = level[1]
            elif action == DENSE and best is not None and _only_prunes(best):
                zeros[row, column] = 0.0
        zeros[np.isfinite(zeros).sum(axis=1) < 2] = np.inf
        if not np.isfinite(zeros).any():
            raise ConfigError(
                "a formula needs levels of sparsity, but no site in a block offers "
                "two of one method. Give actions such as wanda(sparsity=[0.4, 0.5, "
                "0.6])"
            )
        ladder = cls(problem, zeros)
        return replace(ladder, target=ladder._met() if target is None else target)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that have levels, in the model's order."""
        sites = zip(self.problem.space.sites, self._levelled, strict=True)
        return tuple(la for site, free in sites if free for la in site.layers)

    @cached_property
    def numel(self) -> Float[np.ndarray, " layers"]:
        """Weights of every layer."""
        return np.array([layer.numel for layer in self.layers], dtype=np.float64)

    @cached_property
    def blocks(self) -> dict[int, list[int]]:
        """Positions of the layers of every block, in the order of the blocks."""
        found: dict[int, list[int]] = {}
        for position, layer in enumerate(self.layers):
            assert layer.block is not None  # as the levels are chosen
            found.setdefault(layer.block, []).append(position)
        return dict(sorted(found.items()))

    @property
    def block_numel(self) -> Float[np.ndarray, " blocks"]:
        """Weights with levels in every block."""
        return np.array([self.numel[at].sum() for at in self.blocks.values()])

    def over_blocks(
        self, of_blocks: Float[np.ndarray, " blocks"]
    ) -> Float[np.ndarray, " layers"]:
        """Give every layer its block's number."""
        values = np.empty(len(self.layers))
        for number, positions in zip(of_blocks, self.blocks.values(), strict=True):
            values[positions] = number
        return values

    def _met(self) -> float:
        """Find the ratio that, given to every layer, just meets the first budget."""
        budget, space = self.problem.budgets[0], self.problem.space
        prices = prices_of(budget.metric, self.problem.prices)
        costs = prices.padded(space)
        rows = np.flatnonzero(self._levelled)
        others = np.flatnonzero(~self._levelled)
        spent = prices.constant + float(costs[others, self._dearest[others]].sum())
        ladders = []
        for row in rows:
            order = np.argsort(self.zeros[row])
            order = order[np.isfinite(self.zeros[row, order])]
            ladders.append((self.zeros[row, order], costs[row, order]))
        low = min(float(zeros[0]) for zeros, _ in ladders)
        high = max(float(zeros[-1]) for zeros, _ in ladders)
        for _ in range(BISECTIONS):
            ratio = (low + high) / 2
            total = sum(float(np.interp(ratio, *ladder)) for ladder in ladders)
            low, high = (ratio, high) if spent + total > budget.limit else (low, ratio)
        return high

    def nearest(self, ratios: Mapping[Layer, float]) -> Int[np.ndarray, " sites"]:
        """Take each site's level nearest to the mean ratio of its layers.

        A site without levels takes what costs most.
        """
        indices = self._dearest.copy()
        for row in np.flatnonzero(self._levelled):
            site = self.problem.space.sites[row]
            wanted = sum(ratios[la] * la.numel for la in site.layers) / site.numel
            indices[row] = np.abs(self.zeros[row] - wanted).argmin()
        return indices

    def policy(self, ratios: Mapping[Layer, float]) -> Policy:
        """Take the nearest levels, and some sites a level on: the budgets are met.

        Where that does not reach, sites move by more, and those without levels as well.

        Raises:
            BudgetError: If no policy of the space is within the budgets.
        """
        problem, nearest = self.problem, self.nearest(ratios)
        about = np.stack([self._moved(nearest, by) for by in (-1, 0, 1)])
        try:
            projection: Projection | None = Projection(
                problem.space, problem.prices, problem.budgets, among=about
            )
        except BudgetError:
            projection = problem.projection
        assert projection is not None  # there is a budget
        return problem.space.at(projection.fit(nearest, np.random.default_rng(0)))

    def _moved(
        self, indices: Int[np.ndarray, " sites"], by: int
    ) -> Int[np.ndarray, " sites"]:
        """Move every site that has levels by one of them, unless it is the last."""
        moved = indices.copy()
        for row in np.flatnonzero(self._levelled):
            order = np.argsort(self.zeros[row])[: np.isfinite(self.zeros[row]).sum()]
            place = int(np.flatnonzero(order == indices[row])[0]) + by
            moved[row] = order[min(max(place, 0), len(order) - 1)]
        return moved

    @cached_property
    def _levelled(self) -> Bool[np.ndarray, " sites"]:
        levelled: NDArray[np.bool_] = np.isfinite(self.zeros).any(axis=1)
        return levelled

    @cached_property
    def _dearest(self) -> Int[np.ndarray, " sites"]:
        metric = self.problem.budgets[0].metric
        costs = prices_of(metric, self.problem.prices).padded(self.problem.space)
        known = np.where(np.isfinite(costs), costs, -np.inf)
        dearest: NDArray[np.int64] = known.argmax(axis=1)
        return dearest


class Formula(Proposer):
    """A rule of the literature that divides zeros among layers, without any trial."""

    @abstractmethod
    def ratios(
        self, ladder: Ladder, bench: Workbench
    ) -> dict[str, Float[np.ndarray, " layers"]]:
        """Give ratios of zeros whose mean over all weights is the ladder's target.

        Args:
            ladder: Layers and target.
            bench: Model and text; what the formula computes from them is computed here
                and nowhere else, so that it costs nothing unless it is asked for.

        Returns:
            One or several sets of ratios, in the order of ``ladder.layers``, each after
            the name of its origin, which begins with the formula's.
        """

    def propose(self, problem: Problem, bench: Workbench) -> list[Proposal]:
        """Make policies of the ratios; final.

        Raises:
            ConfigError: If the space has no levels of sparsity, or no budget.
            BudgetError: If no policy of the space is within the budgets.
        """
        ladder = Ladder.of(problem)
        return [
            (origin, ladder.policy(dict(zip(ladder.layers, values, strict=True))))
            for origin, values in self.ratios(ladder, bench).items()
        ]


def band(
    importance: Float[np.ndarray, " layers"],
    numel: Float[np.ndarray, " layers"],
    target: float,
) -> Float[np.ndarray, " layers"]:
    """Prune what matters least most: a linear map to ratios around a target.

    The map of AlphaPruning (arXiv:2410.10912): the most important gets ``1 - EPSILON``,
    the least ``1 + EPSILON``, scaled so that the mean over all weights is the target.
    """
    spread = np.ptp(importance)
    if spread == 0:
        return np.full(len(importance), target)
    ratios = 1 - EPSILON + 2 * EPSILON * (importance.max() - importance) / spread
    scaled: NDArray[np.float64] = ratios * target * numel.sum() / (numel @ ratios)
    return scaled


def _choices(problem: Problem) -> list[tuple[int, int, Action]]:
    """List row, column and action of every choice of the sites in blocks."""
    return [
        (row, column, action)
        for row, site in enumerate(problem.space.sites)
        if all(layer.block is not None for layer in site.layers)
        for column, action in enumerate(problem.space.choices[site.name])
    ]


def _level(action: Action) -> tuple[Family, float] | None:
    """Tell the family and the ratio of an action; None if it has no one sparsity."""
    found = [dict(step.params).get("sparsity") for step in action.steps]
    ratios = [ratio for ratio in found if isinstance(ratio, int | float)]
    if len(ratios) != 1:
        return None
    family = tuple(
        (step.method, tuple(pair for pair in step.params if pair[0] != "sparsity"))
        for step in action.steps
    )
    return family, float(ratios[0])


def _only_prunes(family: Family) -> bool:
    """Tell whether a family does nothing but prune: one step, and no ``bits``."""
    return len(family) == 1 and "bits" not in dict(family[0][1])
