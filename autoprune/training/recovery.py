"""What a recovery is: training that gives quality back, with the masks held."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Int
from torch import Tensor, nn

from autoprune.compression.parameters import Parameter, Settings, complete
from autoprune.compression.storage import Storage
from autoprune.models.layers import Inventory
from autoprune.models.task import Task
from autoprune.models.weights import is_parameter, parameter_of
from autoprune.policy import Layer, Value
from autoprune.training.goals import UNITS, Goal
from autoprune.training.masks import FrozenMasks

Told = Callable[[float], None]
"""Is told which share of a recovery is done, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Pupil:
    """A compressed model that is to be trained, and all that it takes.

    Attributes:
        model: The compressed model, float32, in evaluation mode.
        dense: The dense model beside it, never written to.
        inventory: Blocks and layers of both.
        layers: The layers whose weights are trained; all else stays as it is, because
            only layers have variants.
        masks: What is pruned; of every layer that loses weights, also if none has gone.
        storages: What layers are to store afterwards, their zeros above all; those of
            which nothing goes in this phase are not named.
        cut: Those of them that lose units at the end of the course, such as channels.
        task: What the model is for.
        tokenizer: Its tokenizer.
        windows: What to train on.
        validation: Windows to judge a training by; none of them is trained on.
    """

    model: nn.Module
    dense: nn.Module
    inventory: Inventory
    layers: tuple[Layer, ...]
    masks: FrozenMasks
    storages: Mapping[Layer, Storage]
    cut: tuple[Layer, ...]
    task: Task
    tokenizer: Any
    windows: Int[Tensor, "windows length"]
    validation: Int[Tensor, "others length"]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters to train, as the model itself names them.

        One that also holds layers which are not trained, as experts share one, is left
        out.
        """
        named = {p: name for name, p in self.model.named_parameters()}
        still = {la for la in self.inventory.layers if la not in self.layers}
        kept = {self._parameter(layer) for layer in still}
        found = dict.fromkeys(self._parameter(layer) for layer in self.layers)
        return tuple(named[p] for p in found if p not in kept)

    @property
    def trainable(self) -> tuple[Layer, ...]:
        """The layers whose parameters are trained."""
        names = set(self.parameters)
        held = {self.model.get_parameter(name) for name in names}
        return tuple(la for la in self.layers if self._parameter(la) in held)

    @property
    def goals(self) -> dict[Layer, Goal]:
        """How layers are to be pruned that training may prune, or prune elsewhere.

        They are trained, and parameters of their own.
        """
        begun = [layer for layer in self.trainable if layer in self.storages]
        found = {layer: Goal.of(layer, self.storages[layer]) for layer in begun}
        return {
            layer: goal
            for layer, goal in found.items()
            if goal is not None and is_parameter(self.model, layer)
        }

    @property
    def weight_goals(self) -> dict[str, Goal]:
        """Those of them that are of single weights, by the name of the parameter."""
        named = {p: name for name, p in self.model.named_parameters()}
        return {
            named[self._parameter(layer)]: goal
            for layer, goal in self.goals.items()
            if goal.pattern != UNITS
        }

    def _parameter(self, layer: Layer) -> nn.Parameter:
        return self.model.get_parameter(parameter_of(layer.name))


class RecoveryMethod(ABC):
    """A way to train a compressed model. An object has no state.

    Attributes:
        name: Unique, lower case.
        version: Raised when weights come out differently; part of their key.
        reference: The paper, with section or equation.
        parameters: What may be set; ``tokens`` is the budget of a whole schedule.
        prunes: True if it can prune a dense model to what layers are to store.
        from_dense: True if it can do nothing else.
        checkpoint_bytes: What its checkpoints take on disk at most, in bytes a weight
            of the layers it trains.
    """

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    reference: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    prunes: ClassVar[bool] = False
    from_dense: ClassVar[bool] = False
    checkpoint_bytes: ClassVar[float] = 0.0

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters; a subclass may see that they fit together.

        Raises:
            MethodError: If a name is unknown or missing, or a value impossible.
        """
        return complete(self.name, self.parameters, params)

    @abstractmethod
    def recover(
        self,
        pupil: Pupil,
        settings: Settings,
        *,
        share: float,
        folder: Path,
        told: Told,
    ) -> None:
        """Train the model in place.

        The same pupil and settings give the same weights. Every layer is pruned as its
        storage says afterwards, and what the masks prune is ``+0.0``: as they were, or
        as the recovery has replaced them. What is not among the pupil's layers is as it
        was.

        Args:
            pupil: What is trained.
            settings: Complete parameters.
            share: Of the tokens in ``settings``, what this phase may train on.
            folder: For checkpoints; a training that was killed goes on from there.
            told: Hears how far it is.

        Raises:
            ConfigError: If the tokens are not enough for a step.
        """
