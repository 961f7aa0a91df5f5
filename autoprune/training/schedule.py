"""What a schedule is: the phases in which a policy is applied, as plain data.

A schedule says what is on the model in each phase, and which share of the recovery's
tokens follows. It computes nothing: ``carrying`` puts variants on and trains.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from autoprune.compression.actions import Actions
from autoprune.compression.parameters import Parameter, Settings, complete
from autoprune.policy import DENSE, Action, Layer, Step, Value

Pruning = Mapping[Layer, Action]
"""What prunes each layer: its action up to the step that begins to quantize."""


@dataclass(frozen=True, eq=False)
class Phase:
    """A part of a schedule: apply, then recover.

    Attributes:
        pruning: What is on each layer; those not named are dense.
        share: Of the tokens of every recovery, in [0, 1]; 0 for none.
        rewinds: True if kept weights go back to those of the dense model before the
            recovery, with the masks that the weights of now have given.
        by_recovery: True if nothing is put on: the recovery prunes to what ``pruning``
            would store, by what training tells it.
    """

    pruning: Pruning
    share: float
    rewinds: bool = False
    by_recovery: bool = False


@dataclass(frozen=True, eq=False)
class Outline:
    """What a schedule may know of the model and the policy.

    Attributes:
        pruning: What prunes each layer at the end.
        actions: What actions mean.
        errors: Gives, for each block, the share of its squared weights that all of
            ``pruning`` removes, in [0, 1]; it takes the time of making variants.
    """

    pruning: Pruning
    actions: Actions
    errors: Callable[[], Mapping[int | None, float]] = dict

    def at(self, share: float, layers: Sequence[Layer] | None = None) -> Pruning:
        """Give what prunes only to a share of the way.

        Args:
            share: 0 for nothing, 1 for all of it.
            layers: Those that are pruned at all; all by default.
        """
        wanted = self.pruning if layers is None else dict.fromkeys(layers)
        return {
            layer: self._milder(layer, self.pruning[layer], share) for layer in wanted
        }

    @property
    def blocks(self) -> tuple[int | None, ...]:
        """The blocks that have something to prune, in order; None for what is in none.

        What is in no block counts as the first.
        """
        found = {layer.block for layer in self.pruning}
        return tuple(sorted(found, key=lambda one: -1 if one is None else one))

    def _milder(self, layer: Layer, action: Action, share: float) -> Action:
        if share >= 1.0:
            return action
        steps = [milder(step, share) for step in action.steps]
        if share <= 0.0 or None in steps:
            return DENSE
        found = Action(tuple(step for step in steps if step is not None))
        # What rounds to no unit, say, comes in a later phase.
        return DENSE if self.actions.refuses(layer, found) else found


class Schedule(ABC):
    """When and how often the steps of a policy are applied. An object has no state.

    Attributes:
        name: Unique, lower case.
        version: Raised when phases come out differently; part of the key of what was
            trained.
        reference: The paper, with section or equation.
        parameters: What may be set.
        by_recovery: True if it has phases in which the recovery prunes.
    """

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    reference: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    by_recovery: ClassVar[bool] = False

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters; a subclass may see that they fit together.

        Raises:
            MethodError: If a name is unknown or missing, or a value impossible.
        """
        return complete(self.name, self.parameters, params)

    @abstractmethod
    def phases(self, outline: Outline, settings: Settings) -> list[Phase]:
        """Lay out the phases; the last one has all of ``outline.pruning`` on.

        Args:
            outline: What is to be pruned.
            settings: Complete parameters.
        """


def milder(step: Step, share: float) -> Step | None:
    """Give a step that removes a share of what it removes; None if that is nothing.

    A ``sparsity`` and what ``keep`` leaves out are multiplied; of ``N:M`` more are kept
    of every M. Other parameters stay.

    Example:
        >>> from autoprune.policy import Action
        >>> [str(milder(Action.parse(text).steps[0], 0.5)) for text in (
        ...     "wanda(sparsity=0.5)", "wanda(pattern=2:4)", "channels(keep=0.5)")]
        ['wanda(sparsity=0.25)', 'wanda(pattern=3:4)', 'channels(keep=0.75)']
    """
    changed = dict(step.params)
    if "sparsity" in changed:
        changed["sparsity"] = round(float(changed["sparsity"]) * share, 6)
        if not changed["sparsity"]:
            return None
    if "pattern" in changed:
        keep, of = (int(number) for number in str(changed["pattern"]).split(":"))
        keep = of - round((of - keep) * share)
        if keep == of:
            return None
        changed["pattern"] = f"{keep}:{of}"
    if "keep" in changed:
        changed["keep"] = round(1.0 - (1.0 - float(changed["keep"])) * share, 6)
        if changed["keep"] == 1.0:
            return None
    return Step(step.method, tuple(sorted(changed.items())))


def pruning_of(layer: Layer, action: Action, actions: Actions) -> Action:
    """Give what an action does before its first step whose result cannot be trained.

    That is a step which quantizes, factors or narrows: of its result something else is
    stored than the weights. Its place in the action is what recovery waits for.
    """
    steps: tuple[Step, ...] = ()
    for step in action.steps:
        stored = actions.storage(layer, Action((*steps, step)))
        if (stored.bits, stored.low_rank, stored.hidden) != (None, None, None):
            break
        steps = (*steps, step)
    return Action(steps)
