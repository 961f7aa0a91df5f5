"""Budgets, and the prices of additive metrics that they limit.

A price is additive: what a policy costs is a constant plus the sum over its sites.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from autoprune.errors import ConfigError, unknown_name
from autoprune.searching.space import SearchSpace


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper limit of an additive metric.

    Attributes:
        metric: Its name, which ends in its unit: ``size_bytes``.
        limit: Largest value allowed, itself included.
    """

    metric: str
    limit: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.limit) and self.limit > 0):
            raise ConfigError(
                f"the budget of {self.metric} must be positive, found {self.limit!r}"
            )


@dataclass(frozen=True, eq=False)
class Prices:
    """What every choice adds to a metric.

    Attributes:
        metric: Its name, which ends in its unit.
        table: Site name to the price of each of its choices, in their order.
        constant: What no choice changes: untouched tensors, headers.
    """

    metric: str
    table: Mapping[str, Float[np.ndarray, " choices"]]
    constant: float = 0.0

    def padded(self, space: SearchSpace) -> NDArray[np.float64]:
        """Lay the prices out as ``[sites, choices]``; infinite where there is none.

        Raises:
            ConfigError: If a site is missing, or has another number of choices.
        """
        width = max(len(actions) for actions in space.choices.values())
        prices = np.full((len(space.sites), width), np.inf)
        for row, site in enumerate(space.sites):
            count = len(space.choices[site.name])
            own = np.asarray(self.table.get(site.name, ()), dtype=np.float64)
            if own.shape != (count,) or not np.isfinite(own).all():
                raise ConfigError(
                    f"{self.metric} needs {count} finite prices at site {site.name!r}, "
                    f"one a choice, found {own.tolist()}"
                )
            prices[row, :count] = own
        return prices

    def reach(self, space: SearchSpace) -> tuple[float, float]:
        """Tell what the cheapest and the dearest policy of a space cost.

        Raises:
            ConfigError: If a site is missing, or has another number of choices.
        """
        prices = self.padded(space)
        dearest = np.where(np.isfinite(prices), prices, -np.inf).max(axis=1)
        ends = prices.min(axis=1).sum(), dearest.sum()
        return self.constant + float(ends[0]), self.constant + float(ends[1])


def prices_of(metric: str, prices: Sequence[Prices]) -> Prices:
    """Look up the prices of a metric.

    Raises:
        ConfigError: If it has none.
    """
    for entry in prices:
        if entry.metric == metric:
            return entry
    known = [entry.metric for entry in prices]
    raise ConfigError(unknown_name("additive metric", metric, known))
