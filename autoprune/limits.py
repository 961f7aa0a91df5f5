"""Amounts as people write them: time spans, bytes, shares of the dense model."""

import re
from datetime import datetime, timedelta
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from autoprune.errors import ConfigError

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


def parse_bytes(text: Any) -> float:
    """Read an amount of bytes: ``16 GB``, ``800 MB``, or a plain number.

    Raises:
        ValueError: If it is none, or not positive.

    Example:
        >>> parse_bytes("1.5 GB")
        1500000000.0
    """
    match = _AMOUNT.fullmatch(str(text).strip())
    if not match or match[2] in ("%", "x") or float(match[1]) <= 0:
        raise ValueError(f"expected bytes such as 16 GB or 800 MB, found {text!r}")
    return float(match[1]) * _BYTES.get(match[2], 1)


def seconds_until(text: str, now: datetime) -> float:
    """Tell how long it is until a deadline.

    Args:
        text: A time of day, ``07:30``, the next that comes; or a date with a time,
            ``2026-12-01 07:30``.
        now: Local time, with its zone.

    Raises:
        ConfigError: If it is neither, or has passed.

    Example:
        >>> seconds_until("07:30", datetime.fromisoformat("2026-12-01T23:30:00+01:00"))
        28800.0
    """
    try:
        if len(text) <= len("07:30"):
            time = datetime.strptime(text, "%H:%M").time()
            at = datetime.combine(now.date(), time, tzinfo=now.tzinfo)
            at = at if at > now else at + timedelta(days=1)
        else:
            at = datetime.fromisoformat(text)
            at = at if at.tzinfo else at.replace(tzinfo=now.tzinfo)
    except ValueError:
        raise ConfigError(
            "a deadline is a time such as 07:30, or a date with one such as "
            f"2026-12-01 07:30, found {text!r}"
        ) from None
    if at <= now:
        raise ConfigError(f"the deadline {text!r} has passed: it is {now:%F %H:%M}")
    return (at - now).total_seconds()


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
