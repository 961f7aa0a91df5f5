"""Parameters that steps, schedules and recoveries declare, and their checking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoprune.errors import MethodError, unknown_name
from autoprune.policy import Value

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


def complete(
    name: str, parameters: Sequence[Parameter], params: Mapping[str, Value]
) -> Settings:
    """Complete and check what was given for some parameters.

    Args:
        name: Whose parameters they are.
        parameters: What may be given.
        params: What is given.

    Returns:
        Every parameter with its value; one left out without a default is None.

    Raises:
        MethodError: If a name is unknown or missing, or a value impossible.
    """
    known = {parameter.name: parameter for parameter in parameters}
    for given in params:
        if given not in known:
            raise MethodError(unknown_name(f"parameter of {name}", given, known))
    settings = {
        parameter.name: parameter.check(params[parameter.name], name)
        if parameter.name in params
        else parameter.default
        for parameter in parameters
    }
    for parameter in parameters:
        if parameter.required and parameter.name not in params:
            raise MethodError(
                f"{name} needs {parameter.name}=... wherever it stands. "
                f"{parameter.help}"
            )
    return settings
