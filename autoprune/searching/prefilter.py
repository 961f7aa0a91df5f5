"""Takes choices out of a space before their variants are made.

A choice goes where another one of the same site is clearly smaller and clearly closer
to the dense weight. How close is told by what an action stores, without doing it:
magnitude pruning to the same count or pattern, then rounding to the same bits. Methods
that store the same thus score the same and never drop each other.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.formats import FORMATS
from autoprune.compression.grids import fit_grid, nearest_codes
from autoprune.compression.masks import (
    in_tiles,
    kept_by_pattern,
    kept_by_tiles,
    smallest,
)
from autoprune.compression.rounding import round_to_codebook
from autoprune.compression.storage import BITMAP, Storage
from autoprune.compression.variant import Variant
from autoprune.policy import Action, Layer
from autoprune.searching.allocation import allocate
from autoprune.searching.budget import Prices
from autoprune.searching.problem import Problem
from autoprune.searching.space import Refusal, SearchSpace

PRICE_MARGIN = 0.02
"""How much smaller a choice has to be to drop another."""

SCORE_MARGIN = 0.5
"""How much closer to the dense weight it has to be: methods that correct errors, or
read inputs, gain about this much over the plain ones that give the score."""

FEWEST = 2
"""Choices that stay at a site that had as many."""

_ROWS = 128
"""Rows of a weight that stand for all of it, evenly spaced."""


@dataclass(frozen=True, eq=False)
class Filtered:
    """What is left of a problem.

    Attributes:
        problem: The smaller problem.
        dropped: What was taken out, with the reason.
        kept: Of the whole space, which choices are left.
        variants: How many variants, layer by layer, need not be made.
        foreseen: Regret by the scores that decided, as a share of the best sum of
            them; what it really is is known only where the variants are made.
    """

    problem: Problem
    dropped: tuple[Refusal, ...]
    kept: Bool[np.ndarray, "sites choices"]
    variants: int
    foreseen: float = 0.0

    def saved_seconds(self, seconds_a_variant: float) -> float:
        """Estimate the time saved, from the mean time that a variant takes."""
        return self.variants * seconds_a_variant

    def regret(
        self, whole: Problem, costs: Float[np.ndarray, "sites choices"]
    ) -> float:
        """Tell how much more the best policy of the smaller space costs; 0 is ideal.

        Args:
            whole: The problem as it was.
            costs: What every choice of the whole space costs, as it was measured.

        Raises:
            ConfigError: If the costs do not fit the space.
            BudgetError: If no choice is within the budgets.
        """
        sites = np.arange(len(costs))
        best = allocate(whole, costs)
        left = allocate(whole, np.where(self.kept, costs, np.inf))
        return float(costs[sites, left].sum() - costs[sites, best].sum())


def prefilter(
    problem: Problem,
    scores: Float[np.ndarray, "sites choices"],
    *,
    price_margin: float = PRICE_MARGIN,
    score_margin: float = SCORE_MARGIN,
    keep: Collection[Action] = (),
) -> Filtered:
    """Drop the choices that another one of their site dominates.

    The other one costs no more in any priced metric, less by a margin in the first
    (bytes), and scores less by a margin. A policy within the budgets stays within them
    when such a choice is replaced, so no budget becomes impossible.

    Args:
        problem: The space and its prices.
        scores: What ``cheap_scores`` gives.
        price_margin: Share of its first price by which a choice must be dearer.
        score_margin: Share of its score by which a choice must be worse.
        keep: Actions that are never dropped, such as those of rivals.
    """
    space = problem.space
    prices = np.stack([entry.padded(space) for entry in problem.prices])
    metric = problem.prices[0].metric
    kept = np.isfinite(scores)
    dropped: list[Refusal] = []
    variants = 0
    for row, site in enumerate(space.sites):
        actions = space.choices[site.name]
        own = prices[:, row, : len(actions)]
        score = scores[row, : len(actions)]
        by = _dominated(own, score, price_margin, score_margin)
        by = {c: other for c, other in by.items() if actions[c] not in keep}
        # The closest ones stay, where too few would.
        spared = max(len(by) - max(len(actions) - FEWEST, 0), 0)
        for column in sorted(by, key=lambda c: score[c])[:spared]:
            del by[column]
        for column, other in sorted(by.items()):
            kept[row, column] = False
            shares = own[0, other] / own[0, column], score[other] / score[column]
            reason = (
                f"'{actions[other]}' has {shares[0]:.0%} of its {metric} and "
                f"about {shares[1]:.0%} of its error"
            )
            dropped.append((site.name, actions[column], reason))
        variants += len(by) * len(site.layers)
    smaller = _smaller(problem, kept, dropped)
    found = Filtered(smaller, tuple(dropped), kept, variants)
    if not (dropped and problem.budgets):
        return found
    best = allocate(problem, scores)
    least = float(scores[np.arange(len(scores)), best].sum())
    foreseen = found.regret(problem, scores) / least if least else 0.0
    return replace(found, foreseen=foreseen)


def cheap_scores(
    stitched: StitchedModel,
    actions: Actions,
    space: SearchSpace,
    *,
    square_sums: Mapping[str, Float[Tensor, " in"]] | None = None,
) -> Float[np.ndarray, "sites choices"]:
    """Score every choice by its relative weight error, without doing it.

    Args:
        stitched: The model.
        actions: What actions mean.
        space: What may be chosen.
        square_sums: Of inputs by name; errors of a column then count as much as its
            input, as in Wanda. Inputs that are not named count alike.

    Returns:
        The sum over a site's layers; 0 for dense, inf where there is no choice.

    Raises:
        MethodError: If a step refuses a layer.
    """
    width = max(len(choices) for choices in space.choices.values())
    scores = np.full((len(space.sites), width), np.inf)
    for row, site in enumerate(space.sites):
        choices = space.choices[site.name]
        scores[row, : len(choices)] = 0
        for layer in site.layers:
            squares = (square_sums or {}).get(layer.input or "")
            weight = stitched.dense_weight(layer)
            known: dict[Storage, float] = {}
            for column, action in enumerate(choices):
                storage = actions.storage(layer, action)
                if storage not in known:
                    known[storage] = _error(weight, layer, storage, squares)
                scores[row, column] += known[storage]
    return scores


def _error(
    weight: Float[Tensor, "out in"],
    layer: Layer,
    storage: Storage,
    squares: Float[Tensor, " in"] | None,
) -> float:
    """Give the relative error of the plainest way to store a layer like that."""
    if storage == Storage.dense(layer):
        return 0.0
    # Tiles of several rows are whole only where no row is left out.
    stride = ceil(len(weight) / _ROWS) if storage.tile[0] == 1 else 1
    some = weight[::stride].float().contiguous()
    importance = some.abs() if squares is None else some.abs() * squares.sqrt()
    stored = some * _kept(importance, storage)
    if storage.bits is not None:
        stored = _rounded(stored, storage)
    column = torch.ones(()) if squares is None else squares
    lost = (stored - some).square() * column
    if storage.low_rank is not None:  # a share of the rows has that share of the rank
        rank = round(storage.low_rank * len(some) / len(weight))
        lost = torch.linalg.svdvals((stored - some) * column.sqrt())[rank:].square()
    whole = float((some.square() * column).sum())
    return float(lost.sum()) / whole if whole else 0.0


def _rounded(
    weight: Float[Tensor, "some in"], storage: Storage
) -> Float[Tensor, "some in"]:
    """Round weights to the nearest numbers that the storage has codes for."""
    plain = Variant.dense(weight)
    if FORMATS[storage.code].values:
        group = storage.group
        return round_to_codebook(plain, weight, storage.code, group=group).weight
    assert storage.bits is not None
    scales, zeros = fit_grid(
        weight,
        bits=storage.bits,
        group=storage.group,
        symmetric=storage.symmetric,
        dtype=getattr(torch, storage.dtype),
    )
    codes = nearest_codes(weight, scales, zeros, bits=storage.bits).float()
    grouped = codes.view(*scales.shape, -1)
    return ((grouped - zeros[..., None]) * scales[..., None]).view(weight.shape)


def _kept(
    importance: Float[Tensor, "some in"], storage: Storage
) -> Bool[Tensor, "some in"]:
    if storage.mask is None:
        whole = torch.zeros_like if storage.is_factored_alone else torch.ones_like
        return whole(importance, dtype=torch.bool)
    if storage.tile != (1, 1):
        scores = in_tiles(importance.square(), storage.tile).sum(2)
        return kept_by_tiles(scores, storage.sparsity, storage.tile, per="layer")
    if storage.mask != BITMAP:
        return kept_by_pattern(importance, storage.mask)
    count = round(storage.sparsity * importance.numel())
    return ~smallest(importance.reshape(1, -1), count).view(importance.shape)


def _dominated(
    prices: Float[np.ndarray, "metrics choices"],
    score: Float[np.ndarray, " choices"],
    price_margin: float,
    score_margin: float,
) -> dict[int, int]:
    """Name for every dominated choice the closest one that dominates it."""
    cheaper = (prices[:, :, None] <= prices[:, None, :]).all(0)
    first = prices[0]
    cheaper &= first[:, None] <= (first - price_margin * np.abs(first))[None]
    better = cheaper & (score[:, None] <= (1 - score_margin) * score[None])
    np.fill_diagonal(better, False)
    at = {}
    for column in better.any(0).nonzero()[0].tolist():
        others = better[:, column].nonzero()[0]
        at[column] = int(others[score[others].argmin()])
    return at


def _smaller(
    problem: Problem,
    kept: Bool[np.ndarray, "sites choices"],
    dropped: list[Refusal],
) -> Problem:
    space = problem.space
    where = {
        site.name: kept[row].nonzero()[0].tolist()
        for row, site in enumerate(space.sites)
    }
    choices = {n: tuple(space.choices[n][c] for c in left) for n, left in where.items()}
    prices = tuple(
        Prices(
            entry.metric,
            {name: np.asarray(entry.table[name])[left] for name, left in where.items()},
            entry.constant,
        )
        for entry in problem.prices
    )
    refused = (*space.refused, *dropped)
    return replace(
        problem, space=SearchSpace(space.sites, choices, refused), prices=prices
    )
