"""What a policy becomes in each export target: its size there, or why it cannot be."""

from autoprune.errors import ExportError
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import Policy


def check_target(bench: Workbench, policy: Policy, target: str) -> None:
    """Refuse a policy that a target cannot hold, before any work for it.

    Args:
        bench: The model.
        policy: The policy.
        target: Name of the target.

    Raises:
        ExportError: If it cannot; names layer, rule and alternatives.
    """
    if reason := refusal(bench, policy, target):
        holding = sizes_by_target(bench, policy)
        others = f" It can be exported as {', '.join(holding)}." if holding else ""
        raise ExportError(
            f"the target {target!r} cannot hold this policy: {reason}.{others}"
        )


def refusal(bench: Workbench, policy: Policy, target: str) -> str | None:
    """Say why a target cannot hold a policy, or None if it can."""
    exporter, storages = bench.exporters[target], bench.storages(policy)
    actions = bench.per_layer(policy)
    for layer, storage in storages.items():
        if reason := exporter.refuses(layer, storage):
            return f"{layer.name} under {actions[layer]}: {reason}"
    return exporter.refuses_policy(storages, bench.inventory)


def sizes_by_target(bench: Workbench, policy: Policy) -> dict[str, int]:
    """Tell the bytes of a policy in every target that can hold it, the own one first.

    Targets without weights have no size.
    """
    storages = bench.storages(policy)
    exporters = {bench.exporter.name: bench.exporter, **bench.exporters}
    return {
        name: exporter.size_bytes(storages, bench.untouched)
        for name, exporter in exporters.items()
        if exporter.weights and refusal(bench, policy, name) is None
    }
