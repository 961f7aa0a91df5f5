"""What a run was made with, compared key by key."""

from collections.abc import Iterator, Mapping
from typing import Any


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe what differs between two fingerprints, one line a key.

    Example:
        >>> differences({"text": {"seed": 1}}, {"text": {"seed": 2}})
        ['text.seed: 1 then, 2 now']
    """
    before, after = dict(_leaves(then)), dict(_leaves(now))
    return [
        f"{key}: {before.get(key, 'nothing')!r} then, {after.get(key, 'nothing')!r} now"
        for key in {**before, **after}
        if before.get(key, _leaves) != after.get(key, _leaves)
    ]


def _leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Walk plain data, giving each value with the dotted path to it."""
    if isinstance(data, Mapping) and data:
        for key in sorted(data):
            yield from _leaves(data[key], f"{path}.{key}" if path else key)
    else:
        yield path, data
