"""A workbench that also tells time: the metrics of a device's workloads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoprune.compression.storage import Storage
from autoprune.config import LatencyConfig
from autoprune.errors import ConfigError
from autoprune.evaluation.anatomy import Anatomy
from autoprune.evaluation.latency import (
    LatencyMs,
    latency_metric_name,
    latency_metrics,
)
from autoprune.evaluation.workbench import Workbench
from autoprune.latency.device import Device, LatencyBackend
from autoprune.latency.opening import open_device
from autoprune.latency.workload import Workload, find_workload
from autoprune.models.task import output_layer
from autoprune.policy import Layer, Policy, Site


def with_latency(
    bench: Workbench, wanted: LatencyConfig, backends: Iterable[LatencyBackend]
) -> Workbench:
    """Give the workbench with a metric for each workload.

    Args:
        bench: The workbench.
        wanted: Device and workloads.
        backends: Who opens devices.

    Raises:
        ConfigError: If a workload is unknown or impossible.
        ProfileError: If nothing is known of the device.
    """
    device, model = open_device(wanted.device, backends), bench.stitched.model
    workloads = read_workloads(wanted.workloads, device)
    vocabulary = output_layer(model).weight.shape[0]
    anatomy = Anatomy.of(model.config, bench.inventory, vocabulary=vocabulary)
    added = latency_metrics(device, workloads, anatomy)
    return replace(bench, metrics={**bench.metrics, **added})


def read_workloads(
    entries: Sequence[str | Mapping[str, Any]], device: Device
) -> list[Workload]:
    """Read workloads, in the type that is usual on a device unless they name one.

    Args:
        entries: Names of workloads that ship, or some by their own names.
        device: Where they run.

    Raises:
        ConfigError: If one is unknown or impossible, or two have one name.
    """
    found = []
    for entry in entries:
        if isinstance(entry, str):
            found.append(find_workload(entry))
        else:
            found += [Workload.from_dict(name, data) for name, data in entry.items()]
    names = [latency_metric_name(workload.name) for workload in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two workloads make the metric {twice[0]!r}. Give each its own name"
        )
    return [workload.on(device.kind) for workload in found]


def latency_metric_names(wanted: LatencyConfig | None) -> list[str]:
    """Name the metrics that a configuration brings."""
    entries = wanted.workloads if wanted else []
    named = [[one] if isinstance(one, str) else list(one) for one in entries]
    return [latency_metric_name(name) for names in named for name in names]


def latencies(bench: Workbench) -> list[LatencyMs]:
    """List the metrics of time; none where no device was named."""
    return [one for one in bench.metrics.values() if isinstance(one, LatencyMs)]


def timed_by(bench: Workbench) -> dict[str, Any]:
    """Tell what times depend on, for the fingerprint of a run; nothing without any."""
    found = latencies(bench)
    if not found:
        return {}
    workloads = {one.name: str(one.workload) for one in found}
    return {"latency": {"device": found[0].device.basis, "workloads": workloads}}


def forecasts(bench: Workbench, policy: Policy) -> dict[str, dict[str, Any]]:
    """Predict the time of a policy for every workload, beside the dense model's.

    Returns:
        For each workload: milliseconds with the interval that holds 80 of 100, what is
        known how and from what, the ratio to the dense model with its interval, and
        warnings.
    """
    dense = {layer: Storage.dense(layer) for layer in bench.layers}
    storages = bench.storages(policy)
    return {
        one.workload.name: _forecast(one, storages, dense) for one in latencies(bench)
    }


def notes_on(device: Device) -> list[str]:
    """Say what a user should know of a device before a search."""
    notes = [f"time on {device.name}: from {device.basis}"]
    if device.profile is None:
        notes.append(
            "this device was not measured. If you have one at hand, `autoprune profile "
            "--probe` records it in a minute; name the folder as latency: {device: ...}"
        )
    return notes


def notes_of(bench: Workbench, sites: Iterable[Site]) -> list[str]:
    """Say what a user should know of times before a search over some sites."""
    found = latencies(bench)
    notes = notes_on(found[0].device) if found else []
    if found and any(site.kind in ("channels", "heads") for site in sites):
        notes.append(
            "times count channels and heads that are removed as cut out. The target "
            "transformers cuts them where all blocks keep equally many; elsewhere, and "
            "in packed, they are stored as zeros and cost their time until you cut them"
        )
    return notes


def _forecast(
    metric: LatencyMs, storages: Mapping[Layer, Storage], dense: Mapping[Layer, Storage]
) -> dict[str, Any]:
    found, plain = metric.forecast(storages), metric.forecast(dense)
    ratio = found.over(plain)
    low, high = found.total.interval
    return {
        "ms": found.total.ms,
        "interval_ms": [low, high],
        "prefill_ms": found.prefill.ms,
        "decode_ms_per_step": found.decode.ms,
        "parts_ms": found.total.parts,
        "known_by": found.total.shares,
        "worst_tier": str(found.total.tier),
        "over_dense": [ratio.value, ratio.low, ratio.high],
        "warnings": list(found.total.warnings),
        "basis": f"{metric.device.name}: {metric.device.basis}",
    }
