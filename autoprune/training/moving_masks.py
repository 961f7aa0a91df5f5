"""Masks that are made anew during a training, exact after every step."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.training.masks import FrozenMasks


@dataclass(frozen=True, eq=False)
class MaskedWeight:
    """A parameter as a rule sees it; nothing in it is to be written to.

    Attributes:
        weight: Its values; where it is pruned 0, or the shadow if the rule keeps one.
        pruned: True where it is pruned now.
        gradient: Of the step's loss by all weights, the pruned ones too; None unless
            the rule needs it.
    """

    weight: Float[Tensor, "..."]
    pruned: Bool[Tensor, "..."]
    gradient: Float[Tensor, "..."] | None = None


class MaskRule(ABC):
    """Says when masks are made anew, and how; has no state of its own."""

    @property
    def needs_gradient(self) -> bool:
        """Whether it reads gradients of pruned weights."""
        return False

    @property
    def keeps_shadow(self) -> bool:
        """Whether pruned weights keep values that are trained, unseen by the model."""
        return False

    @property
    def shadow_decay(self) -> float:
        """What is added to the gradient of a pruned weight, times its value."""
        return 0.0

    @abstractmethod
    def renews_at(self, step: int) -> bool:
        """Tell whether masks are made anew after a step, counted from 0."""

    @abstractmethod
    def renew(
        self, step: int, now: Mapping[str, MaskedWeight]
    ) -> dict[str, Bool[Tensor, "..."]]:
        """Give the masks that hold from this step on: True where a weight is pruned."""


class MovingMasks:
    """Masks that a rule makes anew after some steps; what is pruned is ``+0.0`` always.

    A weight that is pruned no longer starts at zero, and the optimizer remembers
    nothing of it. A rule with shadows works otherwise: pruned weights keep values that
    the model does not see. They learn, momentum and decay included, from the gradient
    at the masked weights (straight-through: Bengio et al., arXiv:1308.3432; for pruning
    Lin et al., arXiv:2006.07253, Sec. 3), and come back with what they have learnt.
    Gradients are then clipped by the norm of all weights.

    A training is resumed by restoring model and optimizer, then this by
    ``load_state_dict``.

    Args:
        masks: What is pruned at first; afterwards what is pruned now.
        rule: When masks are made anew, and how.
        moving: Names of the parameters whose masks move, of those that ``masks`` has;
            all by default. Other masks stay.

    Attributes:
        masks: What is pruned now.
        step: Steps of the optimizer until now.

    Raises:
        ModelError: If a parameter that is to move has no mask.
    """

    def __init__(
        self,
        masks: FrozenMasks,
        rule: MaskRule,
        moving: Collection[str] | None = None,
    ) -> None:
        self.masks, self.rule, self.step = masks, rule, 0
        self._moving = frozenset(masks.pruned if moving is None else moving)
        if strange := sorted(self._moving - masks.pruned.keys()):
            raise ModelError(
                f"{strange[0]!r} has no mask that could move ({len(strange)} of "
                f"{len(self._moving)} names have none). Name parameters of the masks."
            )
        self._gradients: dict[str, Tensor] = {}
        self._shadows: dict[str, Tensor] = {}
        if rule.keeps_shadow:
            self._shadows = {n: w.detach().clone() for n, w, _ in self._each()}

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.masks.model

    @property
    def pruned(self) -> dict[str, int]:
        """How many weights are pruned now, by the name of their parameter."""
        return self.masks.pruned

    def parameters(self) -> Iterator[tuple[str, Bool[Tensor, "..."]]]:
        """Give the name of each parameter, and True where it is pruned now."""
        yield from self.masks.parameters()

    def check(self) -> None:
        """See that what is pruned now is ``+0.0``, bit by bit.

        Raises:
            ModelError: If it is not; names parameter and count.
        """
        self.masks.check()

    @contextmanager
    def held(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Hold the masks at every step of an optimizer, and make them anew in time.

        As ``FrozenMasks.held`` but for rules with shadows. Every backward pass has to
        be followed by a step before the gradients are set to zero.
        """

        def after(*_: Any) -> None:
            self._after(optimizer)

        with ExitStack() as undo:
            if self.rule.needs_gradient:
                # Before FrozenMasks' hooks, which silence gradients.
                for name, parameter, pruned in self._each():
                    if not parameter.requires_grad:
                        continue
                    hook = partial(self._collect, name, pruned)
                    handle = parameter.register_post_accumulate_grad_hook(hook)
                    undo.callback(handle.remove)
            shadows = self._shadows.keys()
            undo.enter_context(self.masks.held(optimizer, but=shadows))
            if shadows:
                before = optimizer.register_step_pre_hook(self._show_shadows)
                undo.callback(before.remove)
            undo.callback(optimizer.register_step_post_hook(after).remove)
            yield

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed training needs, beside model and optimizer."""
        return {
            "step": self.step,
            "pruned": {name: mask.clone() for name, _, mask in self._each()},
            "shadows": {name: value.clone() for name, value in self._shadows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another one, of the same model and rule, has been.

        Raises:
            ModelError: If it held masks of other parameters, or other shadows.
        """
        found = state["pruned"].keys(), state["shadows"].keys()
        if found != (self._moving, self._shadows.keys()):
            raise ModelError(
                f"the state holds masks of {len(found[0])} parameters and shadows of "
                f"{len(found[1])}, expected {len(self._moving)} and "
                f"{len(self._shadows)} with the same names. Give the state of masks "
                "with this model and rule."
            )
        self.step = state["step"]
        for name, shadow in self._shadows.items():
            shadow.copy_(state["shadows"][name])
        self._replace(state["pruned"])

    @property
    def identity(self) -> dict[str, str]:
        """All that the masks at the end depend on, beside those of now."""
        moving = "\n".join(sorted(self._moving))
        text = hashlib.sha256(f"{self.rule!r}\n{moving}".encode()).hexdigest()
        return {"rule of the masks": text[:16]}

    def _each(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        for name, mask in self.parameters():
            if name in self._moving:
                yield name, self.model.get_parameter(name), mask

    def _replace(self, pruned: Mapping[str, Tensor]) -> None:
        self.masks.replace(dict(self.parameters()) | dict(pruned))

    def _collect(self, name: str, pruned: Tensor, parameter: nn.Parameter) -> None:
        """Keep the whole gradient, before that of pruned weights is silenced."""
        if not self.rule.renews_at(self.step) or parameter.grad is None:
            return
        gradient, kept = parameter.grad, self._gradients.get(name)
        # Of living weights it has grown over the batches of a step, of others not.
        summed = gradient if kept is None else gradient + kept * pruned
        self._gradients[name] = summed.clone()

    @torch.no_grad()
    def _show_shadows(self, *_: Any) -> None:
        decay = self.rule.shadow_decay
        for name, parameter, pruned in self._each() if self._shadows else ():
            parameter.copy_(self._shadows[name])
            if decay and parameter.grad is not None:
                parameter.grad.add_(parameter * pruned, alpha=decay)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        for name, shadow in self._shadows.items():
            shadow.copy_(self.model.get_parameter(name))
        if self.rule.renews_at(self.step):
            self._replace(self.rule.renew(self.step, self._now()))
            if not self.rule.keeps_shadow:
                self.masks.forget(optimizer)
        elif self.rule.keeps_shadow:
            self.masks.apply()
        self._gradients.clear()
        self.step += 1

    def _now(self) -> dict[str, MaskedWeight]:
        if self.rule.needs_gradient:
            missing = [n for n, _, _ in self._each() if n not in self._gradients]
            if missing:
                raise ModelError(
                    f"{missing[0]} has no gradient at step {self.step}, by which "
                    f"weights grow ({len(missing)} of {len(self._moving)} parameters). "
                    "Train all parameters whose masks move."
                )
        return {
            name: MaskedWeight(parameter.detach(), mask, self._gradients.get(name))
            for name, parameter, mask in self._each()
        }
