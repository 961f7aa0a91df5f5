"""The reward is scale-free, and says where it makes no sense."""

import math

import pytest

from autoprune.errors import ConfigError
from autoprune.evaluation.reward import LogRatios

DENSE = {"perplexity": 20.0, "size_bytes": 1000.0, "kl": 0.0, "sparsity": 0.0}
WEIGHTS = LogRatios.default_weights


def score(weights: dict[str, float] | None = None, **changes: float) -> float:
    return LogRatios().score(DENSE | changes, DENSE, weights or dict(WEIGHTS))


def test_dense_scores_zero() -> None:
    assert score() == 0.0


def test_values_worked_by_hand() -> None:
    assert score(perplexity=40.0) == pytest.approx(-math.log(2))
    assert score(size_bytes=500.0) == pytest.approx(0.2 * math.log(2))
    both = score(perplexity=22.0, size_bytes=250.0)
    assert both == pytest.approx(0.2 * math.log(4) - math.log(1.1))


def test_half_the_size_is_worth_15_percent_of_perplexity() -> None:
    assert score(size_bytes=500.0, perplexity=20.0 * 1.148) > 0
    assert score(size_bytes=500.0, perplexity=20.0 * 1.15) < 0


def test_units_cancel() -> None:
    small = {"perplexity": 30.0, "size_bytes": 400.0}
    large = {"perplexity": 30.0, "size_bytes": 400e6}
    dense = {"perplexity": 20.0, "size_bytes": 1000e6}
    assert LogRatios().score(large, dense, WEIGHTS) == pytest.approx(
        LogRatios().score(small, DENSE, WEIGHTS)
    )


def test_a_metric_worth_maximising_takes_a_negative_weight() -> None:
    dense = {"compression_ratio": 1.0}
    weights = {"compression_ratio": -1.0}
    found = LogRatios().score({"compression_ratio": 4.0}, dense, weights)
    assert found == pytest.approx(math.log(4))


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0, 0.0])
def test_divergence_scores_as_low_as_can_be(value: float) -> None:
    assert score(perplexity=value) == -math.inf


def test_an_unknown_metric_is_refused() -> None:
    message = "reward 'logs': unknown metric 'perplexty'. Did you mean 'perplexity'"
    with pytest.raises(ConfigError, match=message):
        score({"perplexty": 1.0})


@pytest.mark.parametrize("name", ["kl", "sparsity"])
def test_a_metric_that_is_zero_when_dense_is_refused(name: str) -> None:
    message = f"ratios to the dense model, whose {name} is 0. .*perplexity in the place"
    with pytest.raises(ConfigError, match=message):
        score({name: 1.0}, kl=0.5, sparsity=0.5)
