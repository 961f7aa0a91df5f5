"""Results as JSON, for machines."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from autoprune.policy import Policy


def to_json(data: Any) -> str:
    r"""Write a result as JSON; a number that is not finite becomes null.

    Example:
        >>> to_json({"kl": float("inf"), "folder": Path("export")})
        '{\n  "kl": null,\n  "folder": "export"\n}'
    """
    return json.dumps(_plain(data), indent=2, allow_nan=False)


def _plain(data: Any) -> Any:
    """Turn what results are made of into what JSON knows."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Policy):
        return data.to_dict()
    if isinstance(data, Mapping):
        return {str(key): _plain(one) for key, one in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(one) for one in data]
    if is_dataclass(data) and not isinstance(data, type):
        return {one.name: _plain(getattr(data, one.name)) for one in fields(data)}
    if isinstance(data, Path | type):
        return str(data) if isinstance(data, Path) else data.__name__
    return data


def solution_data(found: Any) -> dict[str, Any]:
    """Give what was solved for."""
    return {
        "policy": found.policy.to_dict(),
        "metrics": dict(found.metrics),
        "cost": found.cost,
        "model": found.model,
    }
