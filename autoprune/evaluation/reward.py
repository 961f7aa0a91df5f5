"""One number made of a measurement, always maximised."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from autoprune.errors import ConfigError, unknown_name


class Reward(ABC):
    """Makes one number of a measurement.

    Attributes:
        name: Unique, lower case.
        default_weights: Weights of the terms where the user gives none.
    """

    name: ClassVar[str]
    default_weights: ClassVar[Mapping[str, float]]

    @abstractmethod
    def score(
        self,
        measurement: Mapping[str, float],
        dense: Mapping[str, float],
        weights: Mapping[str, float],
    ) -> float:
        """Score a policy; larger is better, NaN or inf if it has diverged.

        Args:
            measurement: Metrics of the policy.
            dense: The same metrics of the dense model.
            weights: Weight of each term.

        Raises:
            ConfigError: If a weight names no metric that can be a term.
        """


class LogRatios(Reward):
    """Minus the weighted sum of the logs of metrics over the dense model's.

    Scale-free: halving the size is worth the same at any size, and units cancel. With
    the default weights, a policy of half the size may cost 15 % of perplexity.
    """

    name = "logs"
    default_weights: ClassVar[Mapping[str, float]] = {
        "perplexity": 1.0,
        "size_bytes": 0.2,
    }

    def score(
        self,
        measurement: Mapping[str, float],
        dense: Mapping[str, float],
        weights: Mapping[str, float],
    ) -> float:
        """Add up the terms; a metric worth maximising takes a negative weight."""
        total = 0.0
        for name, weight in weights.items():
            if name not in measurement:
                raise ConfigError(
                    "reward 'logs': " + unknown_name("metric", name, measurement)
                )
            if not 0 < dense[name] < math.inf:
                raise ConfigError(
                    f"reward 'logs' takes ratios to the dense model, whose {name} is "
                    f"{dense[name]:g}. Use a metric that is positive when dense, such "
                    "as perplexity in the place of kl"
                )
            if not 0 < measurement[name] < math.inf:
                return -math.inf
            total -= weight * math.log(measurement[name] / dense[name])
        return total
