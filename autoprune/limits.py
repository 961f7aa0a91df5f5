"""Amounts as people write them: time spans, bytes, shares of the dense model."""

import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?")
_SECONDS = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(%|x|[kMG]B|B)?")
_BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
# Strict: ``yes`` is no number, and no key goes unread.
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def parse_duration(text: Any) -> float:
    """Read a time span in seconds: ``8h``, ``90 min``, ``45``.

    Raises:
        ValueError: If it is no time span, or not positive.

    Example:
        >>> parse_duration("1.5h")
        5400.0
    """
    match = _DURATION.fullmatch(str(text).strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"expected a time such as 90s, 30min or 8h, found {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


class Limit(BaseModel):
    """A budget's limit: absolute, or relative to the dense model.

    Attributes:
        value: The number.
        relative: True if it is a fraction of the dense model's value.
    """

    model_config = STRICT
    value: float
    relative: bool

    @classmethod
    def parse(cls, text: Any) -> Self:
        """Read a limit: ``40%`` and ``0.4x`` of dense, ``55 MB``, or a plain number.

        Raises:
            ValueError: If it is no limit.

        Example:
            >>> Limit.parse("40%")
            Limit(value=0.4, relative=True)
        """
        if isinstance(text, cls):
            return text
        if isinstance(text, dict):
            return cls(**text)
        match = _AMOUNT.fullmatch(str(text).strip())
        if not match:
            raise ValueError(
                f"expected a limit such as 40%, 0.4x or 55 MB, found {text!r}"
            )
        number, unit = float(match[1]), match[2]
        if unit in ("%", "x"):
            return cls(value=number / 100 if unit == "%" else number, relative=True)
        return cls(value=number * _BYTES.get(unit, 1), relative=False)

    def absolute(self, dense: float) -> float:
        """Give the limit in the metric's own unit."""
        return self.value * dense if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:.4g}{' x dense' if self.relative else ''}"
