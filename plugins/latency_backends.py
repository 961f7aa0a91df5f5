"""The built-in ways to know a device: by recorded profiles, and by data sheets."""

from autoprune.hookspecs import hookimpl
from autoprune.latency.device import LatencyBackend
from autoprune.latency.opening import BUILT_IN


@hookimpl
def register_latency_backends() -> list[LatencyBackend]:
    """Register them."""
    return list(BUILT_IN)
