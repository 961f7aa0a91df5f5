"""When masks are made anew during a training, and how."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.errors import ConfigError, unknown_name
from autoprune.training.choosing import (
    SCOPES,
    prune_counts,
    prune_smallest,
)
from autoprune.training.goals import Goal, prune_towards
from autoprune.training.moving_masks import MaskedWeight, MaskRule
from autoprune.training.ramps import Ramp

GROWTHS = ("gradient", "random")
"""What decides which weights grow."""


@dataclass(frozen=True, slots=True)
class GradualMagnitude(MaskRule):
    """Prunes the smallest weights, more and more of them along a ramp.

    Zhu and Gupta (arXiv:1710.01878, Sec. 3). A ramp that starts late leaves the weights
    to settle first; one that is ``constant`` prunes once.

    How we differ: weights of all parameters compete by default, and a weight that was
    pruned comes back only if it keeps a shadow. The authors' code stops at what it was
    when it was pruned; our shadows go on learning.

    Args:
        ramp: Sparsity after each step, from 0.
        per: One of ``choosing.SCOPES``.
        comes_back: True lets pruned weights keep shadows, which are ranked like others.
    """

    ramp: Ramp
    per: str = "model"
    comes_back: bool = False

    def __post_init__(self) -> None:
        if self.per not in SCOPES:
            raise ConfigError(unknown_name("scope", self.per, SCOPES))

    @property
    def keeps_shadow(self) -> bool:
        """Whether pruned weights keep values that are trained."""
        return self.comes_back

    def renews_at(self, step: int) -> bool:
        """Tell whether the ramp prunes at a step."""
        return self.ramp.prunes_at(step)

    def renew(
        self, step: int, now: Mapping[str, MaskedWeight]
    ) -> dict[str, Bool[Tensor, "..."]]:
        """Prune the smallest: ``round(sparsity * n)`` of each scope."""
        scores = {name: one.weight.abs() for name, one in now.items()}
        if not self.comes_back:  # what is pruned stays so, even beside a living zero
            for name, one in now.items():
                scores[name].masked_fill_(one.pruned, -1.0)
        return prune_smallest(scores, self.ramp.sparsity(step), per=self.per)


@dataclass(frozen=True, slots=True)
class StraightThrough(MaskRule):
    """Prunes the smallest shadows, again and again, as many as each parameter is to.

    SR-STE (Zhou et al. 2021, arXiv:2102.04010): all weights learn from the
    gradient at the pruned ones (straight-through), and those that are pruned are pulled
    to zero, so that masks settle. Without the pull it is dynamic pruning with feedback
    (Lin et al. 2020, arXiv:2006.07253, Sec. 3).

    Args:
        goals: How each parameter is pruned at the end.
        ramp: Share of its goal after each step, ending at 1.
        interval: Steps between two renewals after the ramp, at least 1.
        stop: Step from which masks stay, unless the ramp ends later.
        decay: Strength of the pull, times a pruned weight's value in its gradient.

    Raises:
        ConfigError: If one of these lies out of its range; names it.
    """

    goals: Mapping[str, Goal]
    ramp: Ramp
    interval: int = 1
    stop: float = math.inf
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.ramp.final != 1.0:
            raise ConfigError(
                f"the ramp of shares of a goal ends at 1, found {self.ramp.final}"
            )
        if self.interval < 1:
            raise ConfigError(
                f"the interval of masks is 1 or more, not {self.interval}"
            )
        if not 0 <= self.decay < math.inf:
            raise ConfigError(f"the decay of shadows is 0 or more, not {self.decay}")

    @property
    def keeps_shadow(self) -> bool:
        """It does."""
        return True

    @property
    def shadow_decay(self) -> float:
        """What is added to the gradient of a pruned weight, times its value."""
        return self.decay

    def renews_at(self, step: int) -> bool:
        """Tell whether masks are made anew after a step."""
        if step <= self.ramp.end:
            return self.ramp.prunes_at(step)
        return step < self.stop and (step - self.ramp.end) % self.interval == 0

    def renew(
        self, step: int, now: Mapping[str, MaskedWeight]
    ) -> dict[str, Bool[Tensor, "..."]]:
        """Prune the smallest of each parameter."""
        share = self.ramp.sparsity(step)
        return {
            name: prune_towards(one.weight.abs(), self.goals[name], share)
            for name, one in now.items()
        }


@dataclass(frozen=True, slots=True)
class DropAndGrow(MaskRule):
    """Drops the smallest weights of each parameter, and lets as many others grow.

    RigL (Evci et al. 2020, arXiv:1911.11134, Alg. 1) grows those whose gradients are
    largest; the share that is dropped falls along a cosine, ``fraction / 2 (1 + cos(pi
    t / t_end))``. SET (Mocanu et al. 2018, arXiv:1707.04780), here with the same course
    as its control, grows random ones. What is grown starts at zero. A weight that is
    dropped and grown at once goes on as it was, as in the authors' code.

    How we differ: the step after which masks are made anew is taken too, where the
    paper leaves it out, so that equal steps are equal updates.

    Args:
        steps: Of the whole training.
        interval: Steps between two renewals, at least 1.
        fraction: Share of the living weights that is dropped at first, in [0, 1].
        growth: One of ``GROWTHS``.
        stop: Share of the steps after which masks stay, in [0, 1].
        seed: Of random growth.

    Raises:
        ConfigError: If one of these lies out of its range; names it.
    """

    steps: int
    interval: int = 100
    fraction: float = 0.3
    growth: str = "gradient"
    stop: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        if self.growth not in GROWTHS:
            raise ConfigError(unknown_name("growth", self.growth, GROWTHS))
        for name in ("steps", "interval"):
            if (number := getattr(self, name)) < 1:
                raise ConfigError(f"{name} of drop and grow is 1 or more, not {number}")
        for name in ("fraction", "stop"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ConfigError(f"{name} of drop and grow is in [0, 1], not {share}")

    @property
    def needs_gradient(self) -> bool:
        """Whether it reads gradients of pruned weights."""
        return self.growth == "gradient"

    def renews_at(self, step: int) -> bool:
        """Tell whether weights are dropped and grown after a step."""
        return 0 < step < self.stop * self.steps and step % self.interval == 0

    def dropped(self, step: int) -> float:
        """Give the share of the living weights that is dropped after a step."""
        part = step / (self.stop * self.steps)
        return self.fraction / 2 * (1 + math.cos(math.pi * part))

    def renew(
        self, step: int, now: Mapping[str, MaskedWeight]
    ) -> dict[str, Bool[Tensor, "..."]]:
        """Drop and grow ``round(share * living)`` weights of each parameter."""
        share = self.dropped(step)
        counts = {n: round(share * int((~w.pruned).sum())) for n, w in now.items()}
        sizes = {
            n: w.weight.abs().masked_fill(w.pruned, math.inf) for n, w in now.items()
        }
        dropped = prune_counts(sizes, counts)
        free = {name: now[name].pruned | dropped[name] for name in now}
        pulls = self._pulls(step, now)
        order = {n: (-pulls[n]).masked_fill(~free[n], math.inf) for n in now}
        grown = prune_counts(order, counts)
        return {name: free[name] & ~grown[name] for name in now}

    def _pulls(
        self, step: int, now: Mapping[str, MaskedWeight]
    ) -> dict[str, Float[Tensor, "..."]]:
        """Give what decides which weights grow: the largest do."""
        if self.growth == "random":
            # Of the step alone, so that a resumed training grows the same.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            return {
                name: torch.rand(one.weight.shape, generator=generator).to(one.weight)
                for name, one in now.items()
            }
        pulls = {}
        for name, one in now.items():
            assert one.gradient is not None
            pulls[name] = one.gradient.abs()
        return pulls
