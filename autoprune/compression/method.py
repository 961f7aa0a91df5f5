"""What a compression method is: the abstract base that a plugin finishes.

A method declares its parameters, the statistics it needs, what it refuses and what its
variants store. From that the space, the size, the table of methods and the contract
tests follow.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from autoprune.compression.parameters import Parameter as Parameter
from autoprune.compression.parameters import Settings as Settings
from autoprune.compression.parameters import complete
from autoprune.compression.parameters import keep_of as keep_of
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.models.gradients import LayerGradients
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value


@dataclass(frozen=True, slots=True)
class Source:
    """A layer as a step finds it: dense, or as the step before has left it.

    Attributes:
        layer: The layer.
        variant: Its weight, mask, codes so far. Never written to.
        dense: Its weight before the first step, for methods that bring weights back;
            None where nobody has it. Never written to.
        gradient: Of the dense model's loss by its weight, with what ``needs`` names;
            None if it names none. Never written to.
        norm_scale: Factors of the norm behind, one an output; None if none is known.
            Never written to.
    """

    layer: Layer
    variant: Variant
    dense: Tensor | None = None
    gradient: LayerGradients | None = None
    norm_scale: Tensor | None = None


class CompressionMethod(ABC):
    """A compression algorithm.

    An object has no state: it is made once, when its plugin is loaded, and called from
    any process. The life of an action: ``check`` completes the parameters when a space
    or a policy is read; ``refuses`` is asked for every layer while the space is built;
    ``storage`` prices the action; ``compress`` makes variants, once.

    Attributes:
        name: Unique, lower case.
        version: Raised when variants come out differently; part of their key.
        reference: The paper, with section or equation.
        needs: What ``compress`` reads: names out of ``STATISTICS``, of a layer's
            inputs, and out of ``GRADIENTS``, of its own; or none.
        parameters: What an action may set.
        kinds: Kinds of sites that it acts on as a whole; empty if it may act anywhere.
    """

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    reference: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    kinds: ClassVar[frozenset[str]] = frozenset()

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters of a step.

        Returns:
            Every parameter with its value; one left out without a default is None.

        Raises:
            MethodError: If a name is unknown or missing, or a value impossible.
        """
        return complete(self.name, self.parameters, params)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why this step cannot be done to a layer, or None if it can.

        Asked while the space is built, before anything is computed.

        Args:
            layer: The layer.
            previous: What the step before stores; dense if this is the first.
            settings: Complete parameters.
        """
        return None

    @abstractmethod
    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores, exactly, without making it."""

    @abstractmethod
    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants of layers that share an input, for several settings at once.

        Pure and deterministic: no file, no random state, sources left untouched.

        Args:
            sources: Layers with equal ``input``, each with its variant so far.
            statistics: Of their common input, with what ``needs`` names.
            settings: Complete parameters, one entry a wanted variant.

        Returns:
            For each layer, its variants in the order of ``settings``.

        Raises:
            MethodError: If the numbers do not allow it; names layer and reason.
        """
