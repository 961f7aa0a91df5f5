"""Where a policy and its figures come from: what is written beside them."""

from importlib.metadata import version
from typing import Any

from autoprune.config import TextConfig
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import Policy


def made_for(bench: Workbench, reference: Policy | None) -> dict[str, Any]:
    """Say what a policy was made for, and with what.

    Args:
        bench: The model it was measured on.
        reference: The policy whose compressed model gave the inputs of its variants.
    """
    packages = ("autoprune", "torch", "transformers")
    return {
        "model": {
            "source": bench.checkpoint.source,
            "revision": bench.checkpoint.revision,
        },
        "task": bench.task.name,
        "reference": reference.to_dict() if reference else None,
        "versions": {name: version(name) for name in packages},
    }


def measured_on(bench: Workbench, text: TextConfig, split: str) -> dict[str, Any]:
    """Say on which text figures were measured."""
    windows = bench.splits[split]
    return text.model_dump() | {
        "split": split,
        "windows": len(windows.ids),
        "fingerprint": windows.fingerprint,
    }
