"""Scores policies for the cells of the search benchmark."""

from collections.abc import Sequence

import numpy as np
from evopress import Levels

from autoprune.compression.bank import VariantBank
from autoprune.policy import Policy
from autoprune.searching.plan import Plan


class Arena:
    """A plan seen as EvoPress sees it: one level a layer.

    Args:
        plan: Of a space with one family of levels at every free site.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        space = plan.problem.space
        self.free = [
            i for i, s in enumerate(space.sites) if len(space.choices[s.name]) > 1
        ]
        sites = [space.sites[i] for i in self.free]
        self.names = [site.name for site in sites]
        self.numel = np.array([site.numel for site in sites])
        self.highest = np.array([len(space.choices[site.name]) - 1 for site in sites])

    def policy(self, levels: Levels) -> Policy:
        """Give levels as a policy."""
        space = self.plan.problem.space
        indices = np.zeros(len(space.sites), dtype=np.int64)
        indices[self.free] = levels
        return space.at(indices)

    def at_target(self, target: float) -> Levels:
        """Give each layer's level that is nearest to a sparsity."""
        choices = self.plan.problem.space.choices
        found = [
            np.array([dict(a.steps[0].params)["sparsity"] for a in choices[name]])
            for name in self.names
        ]
        return np.array([int(np.abs(zeros - target).argmin()) for zeros in found])

    def levels(self, policy: Policy) -> Levels:
        """Give a policy as levels."""
        return self.plan.problem.space.index(policy)[self.free]

    def kl(
        self,
        policy: Policy,
        windows: Sequence[int] | None = None,
        *,
        split: str = "fitness",
        bank: VariantBank | None = None,
    ) -> float:
        """Measure the divergence of a policy."""
        bench = self.plan.bench
        teacher = bench.teacher(split)  # of the dense model, which a policy replaces
        (bank or self.plan.bank).put(bench.per_layer(policy))
        return teacher.measure(bench.stitched.model, windows).mean_kl
