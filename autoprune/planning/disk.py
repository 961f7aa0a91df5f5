"""What a run leaves on the disk, to the byte where that is known."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from autoprune.compression.files import ALIGNMENT, FILE_FORMAT
from autoprune.compression.storage import Part, Storage
from autoprune.exporting.weight_files import safetensors_bytes
from autoprune.planning.outlined import Outlined
from autoprune.policy import Action, Layer

SHA256 = "0" * 64

ROW_BYTES = 60
"""Of a trial in the ledger, for each site: policy and parameters as text, twice as they
stand in the file and in its copy; measured at 210 sites."""


def variants_bytes(outlined: Outlined, derived: Mapping[str, str]) -> int:
    """Tell the bytes of all variants of the space, with their files' heads.

    Args:
        outlined: The run.
        derived: For the methods of an action, the part of a variant that follows from
            the dense weight, so that it is made again and not stored.
    """
    found = 0
    actions = outlined.bench.actions
    for layer, action in pairs_of(outlined):
        storage = actions.storage(layer, action)
        methods = " + ".join(step.method for step in action.steps)
        left_out = derived.get(methods)
        found += file_bytes(layer, action, storage, left_out)
    return found


def anew_bytes(outlined: Outlined) -> int:
    """Tell the most that finalists add which are solved on their own inputs.

    They are two, the best and its rival, unless one is both.
    """
    actions, most = outlined.bench.actions, dict[Layer, int]()
    for layer, action in pairs_of(outlined):
        if actions.needs(action):
            size = file_bytes(layer, action, actions.storage(layer, action), None)
            most[layer] = max(size, most.get(layer, 0))
    refined = outlined.config.search.refine != "none"
    return 2 * sum(most.values()) if refined else 0


def pairs_of(outlined: Outlined) -> list[tuple[Layer, Action]]:
    """List every variant of the space: a layer under an action."""
    space = outlined.problem.space
    return [
        (layer, action)
        for site in space.sites
        for action in space.choices[site.name]
        if action.steps
        for layer in site.layers
    ]


def file_bytes(
    layer: Layer, action: Action, storage: Storage, left_out: str | None
) -> int:
    """Tell the size of a variant's file."""
    parts, facts = dict(storage.parts), asdict(storage)
    if left_out is not None and left_out in parts:
        del parts[left_out]
        facts["derived"] = (left_out, SHA256)
    return tensors_bytes(parts, json.dumps(facts), f"{layer.name}: {action}")


def tensors_bytes(parts: Mapping[str, Part], facts: str = "", about: str = "") -> int:
    """Tell the size of one of ``compression.files``' files."""
    metadata = {
        "format": FILE_FORMAT,
        "about": about,
        "storage": facts,
        "sha256": SHA256,
    }
    content = sum(part.nbytes for part in parts.values())
    head = safetensors_bytes(parts, metadata) - content
    return head + -head % ALIGNMENT + content


def teachers_bytes(outlined: Outlined, compute: str) -> int:
    """Tell the bytes of what the dense model makes of the three splits it is asked on.

    Args:
        outlined: The run.
        compute: The type that the model computes in.
    """
    text, hidden = outlined.config.text, outlined.hidden
    found = 0
    for windows in (text.fitness, text.choice, text.report):
        positions = windows * (text.window - 1)
        parts = {
            "features": Part(compute, (positions, hidden)),
            "expected": Part("float32", (positions, hidden)),
            "cross": Part("float32", (positions,)),
            "log_sum": Part("float32", (positions,)),
            "kl": Part("float32", (windows,)),
            "nll": Part("float32", (windows,)),
        }
        found += tensors_bytes(parts)
    return found


def export_bytes(outlined: Outlined) -> tuple[int, int]:
    """Tell the bytes of the smallest and of the largest export that may win."""
    bench, problem = outlined.bench, outlined.problem
    size = problem.prices[0]
    least = {name: float(table.min()) for name, table in size.table.items()}
    most = {name: float(table.max()) for name, table in size.table.items()}
    fixed = bench.exporter.size_bytes({}, bench.untouched)
    limits = [b.limit for b in problem.budgets if b.metric == size.metric]
    largest = min([sum(most.values()), *limits])
    return round(fixed + sum(least.values())), round(fixed + largest)


def ledger_bytes(outlined: Outlined, trials: int) -> int:
    """Tell about how much the rows of trials take, with their copy."""
    return 2 * trials * ROW_BYTES * len(outlined.problem.space.sites)
