"""Policies in files: of their own, of runs and of exports."""

import json
from pathlib import Path
from typing import Any

from autoprune.errors import PolicyError
from autoprune.exporting.folder import POLICY_FILE
from autoprune.policy import Policy

DEFAULT_TASK = "causal-lm"
"""What a model is for where nothing says otherwise."""


def task_of(policy: str | Path | Policy | None) -> str:
    """Tell what a policy's file says that it was made for; else the usual task."""
    if policy is None or isinstance(policy, Policy):
        return DEFAULT_TASK
    read_policy(policy)  # refuses what is no policy
    return str(read_record(policy).get("task", DEFAULT_TASK))


def read_record(path: str | Path) -> dict[str, Any]:
    """Read all that stands beside a policy; what is no policy was refused before."""
    found: dict[str, Any] = json.loads(_file(path).read_text(encoding="utf-8"))
    return found


def _file(path: str | Path) -> Path:
    """Find the policy's file: of a run or an export the one in its folder."""
    return Path(path) / POLICY_FILE if Path(path).is_dir() else Path(path)


def read_policy(path: str | Path) -> Policy:
    """Read a policy from its file, or from the folder of a run or an export.

    Raises:
        PolicyError: If the file is missing or holds no policy.
    """
    try:
        return Policy.from_dict(json.loads(_file(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, PolicyError) as error:
        raise PolicyError(f"cannot read the policy {path}: {error}") from error
