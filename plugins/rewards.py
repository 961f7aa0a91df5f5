"""The built-in reward."""

from autoprune.evaluation.reward import LogRatios, Reward
from autoprune.hookspecs import hookimpl


@hookimpl
def register_rewards() -> list[Reward]:
    """Register it."""
    return [LogRatios()]
