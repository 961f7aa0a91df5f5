"""The built-in reward."""

from autoprune_plugins.metrics import register_metrics
from autoprune_plugins.rewards import register_rewards


def test_its_terms_are_metrics() -> None:
    (reward,) = register_rewards()
    assert reward.name == "logs"
    known = {metric.name for metric in register_metrics()}
    assert reward.default_weights.keys() <= known
