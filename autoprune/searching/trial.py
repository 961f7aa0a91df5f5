"""Evaluates one policy on the fitness split, and remembers what it has measured."""

from autoprune.compression.bank import VariantBank
from autoprune.evaluation.reward import Reward
from autoprune.evaluation.workbench import Measured, Workbench
from autoprune.policy import Policy


class Evaluator:
    """Measures policies with one bank on one split, each of them once.

    Args:
        bench: Model, tokens and metrics.
        bank: Whose variants are used.
        split: Name of the split.
        reward: Adds the column ``reward``, with its weights; None for none.
    """

    def __init__(
        self,
        bench: Workbench,
        bank: VariantBank,
        *,
        split: str = "fitness",
        reward: tuple[Reward, dict[str, float]] | None = None,
    ) -> None:
        self.bench = bench
        self.bank = bank
        self.split = split
        self._reward = reward
        self._memory: dict[str, Measured] = {}
        self._dense: dict[str, float] = {}

    def measure(self, policy: Policy) -> Measured:
        """Give what a policy scores, measured now or before."""
        if policy.fingerprint not in self._memory:
            measured = self.bench.measure(policy, self.bank, self.split)
            if self._reward:
                reward, weights = self._reward
                self._dense = self._dense or self.bench.dense_metrics(self.split)
                score = reward.score(measured.metrics, self._dense, weights)
                measured.metrics["reward"] = score
            self._memory[policy.fingerprint] = measured
        return self._memory[policy.fingerprint]

    def __call__(self, policy: Policy) -> dict[str, float]:
        """Give a policy's metrics."""
        return self.measure(policy).metrics
