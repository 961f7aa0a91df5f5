"""Evaluates policies on the fitness split, and remembers what was measured."""

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from autoprune.compression.bank import VariantBank
from autoprune.compression.shares import Share
from autoprune.evaluation.quality import Quality
from autoprune.evaluation.reward import Reward
from autoprune.evaluation.slopes import measure_slopes
from autoprune.evaluation.workbench import Workbench
from autoprune.models.prefix import Prefix
from autoprune.policy import Policy
from autoprune.searching.costings import Costing, Costs
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.space import SearchSpace

SAMPLED = 128
"""Positions of a pass whose gradients and inputs are paired for the curvature; a sixth
of the time of a gradient on 1,024 tokens (measured)."""


@dataclass(frozen=True, eq=False)
class Score:
    """What a policy scored.

    Attributes:
        metrics: Value of every metric, by name.
        windows: KL of each window that it was measured on, from the first; empty where
            the model did not run.
        put_s: Seconds that putting its variants on the model took: dear where they come
            from a cold disk, and paid once, however many windows follow.
    """

    metrics: Mapping[str, float]
    windows: tuple[float, ...] = ()
    put_s: float = 0.0


class Evaluator(ABC):
    """Measures policies; a worker that keeps model and variants between them."""

    @abstractmethod
    def measure(
        self,
        policy: Policy,
        windows: int | None = None,
        *,
        near: Policy | None = None,
    ) -> Score:
        """Measure a policy on the fitness split.

        What it raises fails the trial, and the search goes on.

        Args:
            policy: The policy.
            windows: How many windows, from the first; None for all.
            near: The incumbent: what it left behind its blocks may be used where the
                policy is the same up to there. The figures are the same without.
        """

    @abstractmethod
    def slopes(
        self,
        policy: Policy,
        *,
        tokens: int,
        draws: int,
        turn: int,
        drawn_tokens: int | None = None,
        beside: Sequence[int] = (),
        part: tuple[int, int] = (0, 1),
    ) -> SiteSlopes:
        """Take the slopes at a policy.

        Args:
            policy: The policy.
            tokens: How many tokens the gradient is taken on, in whole windows.
            draws: How often labels are drawn for the curvature.
            turn: How often slopes were taken before: other windows come each time,
                until all of the split has been used.
            drawn_tokens: On how many of the tokens labels are drawn; None for all.
            beside: Windows that are not to be taken: slopes at this policy were taken
                on them before.
            part: Which share of the windows is taken here, of how many: others may
                take the rest.
        """

    def make(self, share: Share) -> int:
        """Make a share of the variants that may be asked for; tell how many it was."""
        return 0

    def costs(self, costing: Costing) -> Costs:
        """Measure what choices cost by themselves, or a share of that."""
        raise NotImplementedError(f"{type(self).__name__} has no variants to measure")


class LocalEvaluator(Evaluator):
    """Measures in this process, with one bank, each window of a policy once.

    Args:
        bench: Model, tokens and metrics.
        bank: Whose variants are used.
        space: The choices that slopes are wanted of.
        reward: Adds the column ``reward``, with its weights; None for none.
        seed: Where in the split the windows of the first slopes begin.
    """

    SPLIT = "fitness"

    def __init__(
        self,
        bench: Workbench,
        bank: VariantBank,
        space: SearchSpace,
        *,
        reward: tuple[Reward, dict[str, float]] | None = None,
        seed: int = 0,
    ) -> None:
        self.bench = bench
        self.bank = bank
        self.space = space
        self._reward = reward
        self._seed = seed
        self._memory: dict[str, Quality] = {}
        self._prefix = Prefix(bench.inventory)
        self._dense: dict[str, float] = {}

    def measure(
        self,
        policy: Policy,
        windows: int | None = None,
        *,
        near: Policy | None = None,
    ) -> Score:
        """Measure a policy, on those windows only that it was not measured on yet."""
        known = self._memory.get(policy.fingerprint)
        if near is not None:
            self._prefix.adopt(self.bench.per_layer(near))
        measured = self.bench.measure(
            policy,
            self.bank,
            self.SPLIT,
            windows=windows,
            known=known,
            prefix=self._prefix,
        )
        metrics = dict(measured.metrics)
        if self._reward:
            reward, weights = self._reward
            self._dense = self._dense or self.bench.dense_metrics(self.SPLIT)
            metrics["reward"] = reward.score(metrics, self._dense, weights)
        if measured.quality is None:
            return Score(metrics)
        self._memory[policy.fingerprint] = measured.quality
        windows_kl = tuple(measured.quality.kl.double().tolist())
        return Score(metrics, windows_kl, measured.timings["put_s"])

    def make(self, share: Share) -> int:
        """Make a share of the variants of the space."""
        choices = self.space.choices
        pairs = [
            (layer, action)
            for site in self.space.sites
            for action in choices[site.name]
            for layer in site.layers
        ]
        return self.bank.make(pairs, share=share)

    def costs(self, costing: Costing) -> Costs:
        """Measure what choices cost, with the variants of the bank."""
        return dict(ChainMap(*map(dict, costing.run(self.bench, self.bank))))

    def slopes(
        self,
        policy: Policy,
        *,
        tokens: int,
        draws: int,
        turn: int,
        drawn_tokens: int | None = None,
        beside: Sequence[int] = (),
        part: tuple[int, int] = (0, 1),
    ) -> SiteSlopes:
        """Take the slopes of all choices at a policy."""
        bench = self.bench
        teacher = bench.teacher(self.SPLIT)
        total, length = teacher.windows.ids.shape
        share, shares = part
        count = min(total - len(beside), max(shares, round(tokens / length)))
        first = (self._seed + turn) * count
        order = ((first + i) % total for i in range(total))
        taken = list(islice((w for w in order if w not in beside), count))
        windows = taken[share::shares]
        self.bank.put(bench.per_layer(policy))
        variants = {
            layer: [self.bank.weight(layer, action) for action in choices]
            for site in self.space.sites
            if len(choices := self.space.choices[site.name]) > 1
            for layer in site.layers
        }
        found = measure_slopes(
            bench.stitched.model,
            teacher,
            variants,
            windows,
            draws=draws,
            drawn=drawn_tokens and max(1, round(drawn_tokens / length / shares)),
            sampled=SAMPLED,
            seed=turn,
        )
        return SiteSlopes.of(self.space, found, windows)
