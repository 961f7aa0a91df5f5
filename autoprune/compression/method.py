"""What a compression method is: the abstract base that a plugin finishes.

A method declares its parameters, the statistics it needs, what it refuses and what its
variants store. From that the space, the size, the table of methods and the contract
tests follow.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError, unknown_name
from autoprune.models.gradients import LayerGradients
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value

Settings = Mapping[str, Any]
"""Parameters of one step, complete: defaults filled in, every value checked."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: As written in an action.
        kind: ``int``, ``float``, ``bool`` or ``str``.
        default: Value where the action names none; None if it may be left out.
        low: Smallest value allowed, itself included unless ``open_range``.
        high: Largest value allowed, itself included unless ``open_range``.
        open_range: True if ``low`` and ``high`` themselves are not allowed.
        pattern: True for an ``N:M`` pattern such as ``2:4``: N kept of every M.
        choices: Words that a ``str`` is one of, in the order of tables; any if empty.
        required: True if every action has to name it.
        help: What it does, in one line.
        example: Value that tables and docs show where a default does not suffice; see
            ``examples``. None for none.
    """

    name: str
    kind: type
    default: Value | None
    help: str
    low: float | None = None
    high: float | None = None
    open_range: bool = False
    pattern: bool = False
    choices: tuple[str, ...] = ()
    required: bool = False
    example: Value | None = None

    def check(self, value: Any, method: str) -> Value:
        """Return the value in its kind.

        Raises:
            MethodError: If it has another kind, lies outside of its range or is none
                of its choices; lists near misses.
        """
        where = f"{method}({self.name}=...)"
        if self.kind is float and type(value) is int:
            value = float(value)
        kind: type = type(value)
        if kind is not self.kind:
            takes = _KINDS[self.kind]
            if self.choices:
                takes = f"one of {', '.join(self.choices)}"
            raise MethodError(f"{where} takes {takes}, found {value!r}. {self.help}")
        if self.choices and value not in self.choices:
            unknown = unknown_name("word", value, self.choices)
            raise MethodError(f"{where}: {unknown}. {self.help}")
        if self.pattern:
            keep_of(value)
        elif self.low is not None and not self._within(value):
            ends = "between {} and {}" if self.open_range else "from {} to {}"
            span = ends.format(f"{self.low:g}", f"{self.high:g}")
            raise MethodError(f"{where} lies {span}, found {value!r}. {self.help}")
        checked: Value = value
        return checked

    def _within(self, value: float) -> bool:
        assert self.low is not None and self.high is not None
        if self.open_range:
            return self.low < value < self.high
        return self.low <= value <= self.high


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
}


def keep_of(pattern: str) -> tuple[int, int]:
    """Read an ``N:M`` pattern: keep N weights of every M consecutive ones of a row.

    Raises:
        MethodError: If it is no such pattern, or keeps none or all.

    Example:
        >>> keep_of("2:4")
        (2, 4)
    """
    keep, _, of = str(pattern).partition(":")
    if not (keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of) <= 64):
        raise MethodError(
            f"a pattern is written keep:of with 0 < keep < of <= 64, such as 2:4; "
            f"found {pattern!r}"
        )
    return int(keep), int(of)


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
    """

    layer: Layer
    variant: Variant
    dense: Tensor | None = None
    gradient: LayerGradients | None = None


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
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in params:
            if name not in known:
                raise MethodError(
                    unknown_name(f"parameter of {self.name}", name, known)
                )
        settings = {
            name: parameter.check(params[name], self.name)
            if name in params
            else parameter.default
            for name, parameter in known.items()
        }
        for name, parameter in known.items():
            if parameter.required and name not in params:
                raise MethodError(
                    f"{self.name} needs {name}=... in every action. {parameter.help}"
                )
        return settings

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
