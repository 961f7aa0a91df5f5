"""Reinforcement learning over sites in order, as AMC does it, by policy gradient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from numpy.random import Generator
from numpy.typing import NDArray

from autoprune.hookspecs import hookimpl
from autoprune.searching.budget import prices_of
from autoprune.searching.problem import Problem
from autoprune.searching.projection import SLACK
from autoprune.searching.strategies import PolicySampler, SamplerFactory, notes_of

WARM_UP = 16
"""Proposals of the untrained policy, all of which its first update sees."""

BATCH = 8
"""Proposals between two updates."""

WIDTH = 0.2
"""Standard deviation of a site's share, as of AMC's noise, before it narrows."""

NARROWING = 0.98
"""Factor on the width at every update."""

NARROWEST = 0.08
"""Least width."""

RATE = 0.5
"""Step of the features' weights, in natural units."""

SITE_RATE = 0.4
"""Step of each site's own weight: one of hundreds, it hears little but noise."""

FLOOR = 0.25
"""Least variance of a share, in squared widths, that a step of its mean assumes."""

CLIP = 2.0  # standard deviations of reward: a diverged trial is bad, not all there is
Array = NDArray[np.float64]


@dataclass
class Weights:
    """What the policy learns.

    Attributes:
        shared: On the features of a state.
        site: Of each site alone.
        choice: On each group of choices that are alike, beside their price.
    """

    shared: Array
    site: Array
    choice: Array

    @classmethod
    def of(cls, walk: "Walk", noted: Mapping[str, Sequence[float]] | None) -> Self:
        """Read noted weights; zeros, an untrained policy, if there are none."""
        if noted is not None:
            return cls(*(np.array(noted[f.name]) for f in fields(cls)))
        counts = walk.features, len(walk.counts), walk.groups
        return cls(*(np.zeros(count) for count in counts))

    def to_json(self) -> dict[str, list[float]]:
        """Write them as a note; numbers come back with the same bits."""
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}


class Walk:
    """The walk over sites: states, and the actions that leave the budget reachable.

    A choice is seen as its share: 0 for the cheapest of its site, 1 for the dearest.
    What is left of the budget is a share as well, of what the sites to come can spend.

    Args:
        problem: What may be chosen. Without budgets every action is allowed, and the
            share that is left is one half throughout.
    """

    def __init__(self, problem: Problem) -> None:
        space, budgets, prices = problem.space, problem.budgets, problem.prices
        self.counts = np.array([len(space.choices[s.name]) for s in space.sites])
        self.exists = np.arange(self.counts.max()) < self.counts[:, None]
        named = prices_of(budgets[0].metric, prices) if budgets else None
        named = named or (prices[0] if prices else None)
        order = np.broadcast_to(np.arange(self.counts.max()) * 1.0, self.exists.shape)
        price = named.padded(space) if named else np.where(self.exists, order, np.inf)
        self.price = np.where(self.exists, price, 0.0)
        low, high = price.min(axis=1), np.where(self.exists, price, -np.inf).max(axis=1)
        span = np.maximum(high - low, 1e-12)[:, None]
        self.share = np.where(self.exists, (price - low[:, None]) / span, 0.0)
        # What the sites from each on cost at least and at most.
        self.least = np.append(np.cumsum(low[::-1])[::-1], 0.0)
        self.most = np.append(np.cumsum(high[::-1])[::-1], 0.0)
        self.limit, self.slack = np.inf, np.inf
        if budgets and named and self.most[0] + named.constant > budgets[0].limit:
            self.limit = budgets[0].limit - named.constant
            self.slack = SLACK * budgets[0].limit
        self.fixed = _features(problem, span[:, 0])
        self.features = self.fixed.shape[1] + 2
        self.group = _groups(problem)
        self.groups = int(self.group.max()) + 1

    def look(
        self, site: Any, spent: Array, before: Array
    ) -> tuple[Array, Array, NDArray[np.bool_]]:
        """See a state, or the states of many walks at many sites at once.

        Args:
            site: Index of the site.
            spent: What the sites before it cost.
            before: Share of the action at the site before.

        Returns:
            The share that is left, the features, and the allowed actions.
        """
        least, most = self.least[site], self.most[site]
        left = np.full_like(spent, 0.5)
        allowed = np.broadcast_to(self.exists[site], (*spent.shape, len(self.group[0])))
        if np.isfinite(self.limit):
            span = np.maximum(most - least, 1e-12)
            left = np.clip((self.limit - spent - least) / span, 0.0, 1.0)
            after = (self.limit - spent)[..., None] - self.price[site]
            under = (
                np.asarray(self.least[np.add(site, 1)])[..., None]
                <= after + 1e-9 * self.limit
            )
            over = after - np.asarray(self.most[np.add(site, 1)])[..., None]
            fits = allowed & under
            fills = fits & (over <= self.slack)
            allowed = np.where(fills.any(axis=-1, keepdims=True), fills, fits)
        state = np.stack([left - 0.5, before - left], axis=-1)
        fixed = np.broadcast_to(self.fixed[site], (*spent.shape, self.fixed.shape[1]))
        return left, np.concatenate([fixed, state], axis=-1), allowed


class PolicyGradientSampler(PolicySampler):
    """Draws an action at each site in order, by a policy that rewards have taught.

    AMC (He et al., ECCV 2018, arXiv:1802.03494) walks over the layers; a state holds
    the layer's place, kind and size, what is left of the budget, and the last action;
    an action is bounded so that the layers to come can still meet the budget; the only
    reward comes at the end. So it is here. AMC learns a continuous ratio by DDPG, an
    actor and a critic of 300 x 300 units, over 900 episodes. We have some hundred
    episodes and actions that are no numbers, so: a softmax over the choices, nearer to
    a mean share being likelier, the mean linear in the state; REINFORCE with the
    batch's mean as its baseline; steps by the natural gradient. Actions are bounded
    from below too: a budget is filled up.

    A batch of rows drawn by one policy makes one update, so each meets the very policy
    that it was drawn by. The first row after an update notes the new weights; each row
    notes how many updates its policy had. The first ``WARM_UP`` proposals are random,
    around an equal share for every site.
    """

    def propose(self) -> tuple[Int[np.ndarray, " sites"], Mapping[str, Any]]:
        """Walk over the sites once, learning first if there is a batch."""
        rng = self.brief.rng()
        walk = Walk(self.problem)
        rows = [(trial, notes_of(trial)) for trial in self.brief.history]
        learned = {n["update"]: n["weights"] for _, n in rows if "weights" in n}
        update = max(learned, default=0)
        weights = Weights.of(walk, learned.get(update))
        batch = [t for t, n in rows if n.get("update") == update and t.values]
        notes: dict[str, Any] = {}
        if len(batch) >= (BATCH if update else WARM_UP):
            actions = np.stack([self.space.index(trial.policy) for trial in batch])
            values = np.array([trial.values[0] for trial in batch])
            _learn(walk, weights, actions, values, _width(walk, update))
            update += 1
            notes["weights"] = weights.to_json()
        indices = _roll(walk, weights, _width(walk, update), rng)
        projection = self.problem.projection
        fitted = indices if projection is None else projection.fit(indices, rng)
        return fitted, notes | {"update": update}


def _width(walk: Walk, update: int) -> float:
    """Narrow the noise as AMC does, but not below what reaches the next level."""
    level = 0.5 / max(1, int(walk.counts.max()) - 1)
    return max(WIDTH * NARROWING**update, NARROWEST, level)


def _learn(
    walk: Walk,
    weights: Weights,
    actions: Int[np.ndarray, "walks sites"],
    values: Float[np.ndarray, " walks"],
    width: float,
) -> None:
    """Take one step along the natural gradient of the expected reward, in place."""
    if not (spread := values.std()) > 0:
        return
    reward = np.clip((values.mean() - values) / spread, -CLIP, CLIP)
    sites = np.arange(actions.shape[1])
    price, share = walk.price[sites, actions], walk.share[sites, actions]
    spent = np.cumsum(price, axis=1) - price
    before = np.concatenate([np.full((len(share), 1), 0.5), share[:, :-1]], axis=1)
    left, state, allowed = walk.look(sites, spent, before)
    # The projection's last repair may have taken what the walk would not have.
    taken = np.arange(allowed.shape[-1]) == actions[..., None]
    odds = _odds(walk, weights, sites, left, state, allowed | taken, width)
    mean = (odds * walk.share).sum(axis=-1)
    variance = (odds * walk.share**2).sum(axis=-1) - mean**2
    slope = reward[:, None] * (share - mean) / width**2
    # At a site that all but always takes one choice the gradient tells nothing; taken
    # at its word, such a site would jump.
    weight = np.maximum(variance, FLOOR * width**2) / width**4
    flat = state.reshape(-1, state.shape[-1])
    fisher = flat.T @ (flat * weight.reshape(-1, 1))
    fisher += (1e-3 * np.trace(fisher) / len(fisher) + 1e-9) * np.eye(len(fisher))
    weights.shared += RATE * np.linalg.solve(fisher, flat.T @ slope.ravel())
    weights.site += SITE_RATE * slope.sum(axis=0) / (weight.sum(axis=0) + 1e-9)
    surprise = (taken - odds) * reward[:, None, None]
    groups = np.broadcast_to(walk.group, odds.shape).ravel()
    push = np.bincount(groups, surprise.ravel(), walk.groups)
    curve = np.bincount(groups, (odds * (1 - odds)).ravel(), walk.groups)
    weights.choice += RATE * push / (curve + 1.0)


def _odds(
    walk: Walk,
    weights: Weights,
    site: Any,
    left: Array,
    state: Array,
    allowed: NDArray[np.bool_],
    width: float,
) -> Array:
    """Give the probability of every choice, zero where it is not allowed."""
    mean = left + state @ weights.shared + weights.site[site]
    logits = (walk.share[site] - mean[..., None]) ** 2 / (-2 * width**2)
    logits = np.where(allowed, logits + weights.choice[walk.group[site]], -np.inf)
    odds: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))
    odds /= odds.sum(axis=-1, keepdims=True)
    return odds


def _roll(
    walk: Walk, weights: Weights, width: float, rng: Generator
) -> NDArray[np.int64]:
    """Draw an action at each site in order."""
    indices = np.zeros(len(walk.counts), dtype=np.int64)
    spent, before = np.zeros(1), np.full(1, 0.5)  # of one walk
    for site, chance in enumerate(rng.random(len(indices))):
        left, state, allowed = walk.look(site, spent, before)
        if not allowed.any():  # rounding of a running sum; the projection repairs it
            allowed = walk.exists[site][None]
        odds = _odds(walk, weights, site, left, state, allowed, width)[0]
        drawn = int(np.searchsorted(np.cumsum(odds), chance, side="right"))
        indices[site] = min(drawn, int(walk.counts[site]) - 1)
        spent = spent + walk.price[site, indices[site]]
        before = walk.share[site, indices[site], None]
    return indices


def _features(problem: Problem, span: Array) -> Array:
    """Describe each site: depth, its square, its part of the budget, its roles."""
    firsts = [site.layers[0] for site in problem.space.sites]
    blocks = np.array([-1 if one.block is None else one.block for one in firsts])
    depth = (blocks - blocks.min()) / max(1, blocks.max() - blocks.min()) * 2.0 - 1.0
    size = span / max(float(span.max()), 1e-12)
    names = [_role(site.name) for site in problem.space.sites]
    roles = [[float(name == role) for role in dict.fromkeys(names)] for name in names]
    return np.column_stack([depth, depth**2, size, np.array(roles)])


def _role(site: str) -> str:
    """Name a site's place in its block, the last part of its name."""
    return site.rpartition(".")[2]


def _groups(problem: Problem) -> NDArray[np.int64]:
    """Number choices of the same methods at sites of the same role."""
    space = problem.space
    width = max(len(actions) for actions in space.choices.values())
    groups = np.zeros((len(space.sites), width), dtype=np.int64)
    numbers: dict[tuple[str, ...], int] = {}
    for row, site in enumerate(space.sites):
        for column, action in enumerate(space.choices[site.name]):
            name = (_role(site.name), *(step.method for step in action.steps))
            groups[row, column] = numbers.setdefault(name, len(numbers))
    return groups


@hookimpl
def register_samplers() -> list[SamplerFactory]:
    """Return the strategy."""
    return [
        SamplerFactory(
            "policy_gradient",
            PolicyGradientSampler,
            "AMC: reinforcement learning over sites in order; one objective",
            several=False,
        )
    ]
