"""What a search may choose, what it costs, and what it must keep to."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autoprune.errors import ConfigError
from autoprune.policy import Policy
from autoprune.searching.budget import Budget, Prices, prices_of
from autoprune.searching.projection import Projection
from autoprune.searching.space import SearchSpace

log = logging.getLogger(__name__)

Proposal = tuple[str, Policy]
"""A policy to try first, after the name of its origin."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What a search may choose and must keep to.

    Attributes:
        space: The actions allowed at every site.
        prices: Additive metrics, known without evaluating.
        budgets: Limits on some of them; the first is filled up.
    """

    space: SearchSpace
    prices: tuple[Prices, ...] = ()
    budgets: tuple[Budget, ...] = ()

    @cached_property
    def projection(self) -> Projection | None:
        """What moves choices on to the budgets; None without budgets.

        Raises:
            ConfigError: If a budget's metric has no price.
            BudgetError: If no policy of the space is within the budgets.
        """
        return (
            Projection(self.space, self.prices, self.budgets) if self.budgets else None
        )

    def price(self, metric: str, policy: Policy) -> float:
        """Sum what a policy costs in one metric.

        Raises:
            ConfigError: If the metric has no price.
        """
        prices = prices_of(metric, self.prices)
        indices = self.space.index(policy)
        pairs = zip(self.space.sites, indices, strict=True)
        return prices.constant + float(sum(prices.table[s.name][i] for s, i in pairs))

    def within(self, policy: Policy) -> bool:
        """Tell whether a policy keeps to every budget."""
        return all(self.price(b.metric, policy) <= b.limit for b in self.budgets)

    def admitted(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """Keep the proposals within the budgets, each policy once."""
        kept: dict[str, Proposal] = {}
        for origin, policy in proposals:
            if self.within(policy):
                kept.setdefault(policy.fingerprint, (origin, policy))
            else:
                log.info("proposal %r is over the budget and left out", origin)
        return list(kept.values())

    def between(self, one: Policy, other: Policy) -> Policy:
        """Mix two policies, site by site, so that the budgets are just met.

        Raises:
            BudgetError: If no mix of the two is within the budgets.
        """
        if not self.budgets:
            raise ConfigError("two policies are mixed to meet a budget, found none")
        ends = np.stack([self.space.index(one), self.space.index(other)])
        mix = Projection(self.space, self.prices, self.budgets, among=ends)
        return self.space.at(mix.fit(mix.cheapest, np.random.default_rng(0)))
