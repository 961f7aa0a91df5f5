"""What a recording tells of the machine: the device, the software, its state.

Nothing of a device is ever set.
"""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_int8")
"""Units that decide which CPU kernels are fast."""

PACKAGES = ("torchao", "triton", "transformers", "numpy")

NVIDIA_SMI = (
    "driver_version,power.limit,power.draw,clocks.sm,clocks.mem,temperature.gpu"
)


def device_facts(kind: str) -> dict[str, Any]:
    """Tell what decides the speed of a device: ``cuda`` or ``cpu``."""
    if kind == "cuda":
        about = torch.cuda.get_device_properties(0)
        return {
            "kind": "cuda",
            "name": about.name,
            "capability": [about.major, about.minor],
            "sm_count": about.multi_processor_count,
            "l2_bytes": int(getattr(about, "L2_cache_size", 0)),
            "memory_bytes": about.total_memory,
        }
    return {
        "kind": "cpu",
        "name": _cpu_field("model name") or platform.machine(),
        "threads": 1,
        "cores": os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in _cpu_field("flags").split()],
        "caches": _caches(),
        "memory_bytes": _memory(),
    }


def cache_bytes(device: dict[str, Any]) -> float:
    """Give the size of the cache that lies before memory."""
    if device["kind"] == "cuda":
        return float(device["l2_bytes"])
    return float(max(device["caches"].values(), default=32 << 20))


def software_facts() -> dict[str, Any]:
    """Tell the versions of all that decides kernels."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cusparselt": torch.backends.cusparselt.version(),
        "cublas": _installed("nvidia-cublas", "nvidia-cublas-cu12"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
    }
    return found | {name: _installed(name) for name in PACKAGES}


def state(kind: str) -> dict[str, Any]:
    """Tell how the machine is just now: its load, and a GPU's clocks and power."""
    found: dict[str, Any] = {"load": list(os.getloadavg()), "pressure": _pressure()}
    if kind == "cuda":
        found["gpu"] = _gpu_state()
        found["memory_allocated"] = torch.cuda.memory_allocated()
    return found


def _gpu_state() -> dict[str, str]:
    """Ask the driver's own tool; empty where there is none."""
    command = [
        "nvidia-smi",
        f"--query-gpu={NVIDIA_SMI}",
        "--format=csv,noheader",
        "--id=0",
    ]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = told.stdout.strip().split(", ")
    return dict(zip(NVIDIA_SMI.split(","), values, strict=False))


def _installed(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _cpu_field(name: str) -> str:
    """Read a field of the first processor; empty where the system tells none."""
    for line in _text("/proc/cpuinfo").splitlines():
        field, _, value = line.partition(":")
        if field.strip() == name:
            return value.strip()
    return ""


def _caches() -> dict[str, int]:
    """Give the sizes of the caches that hold data, by level."""
    found = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = _text(folder / "size").strip()
        if size and _text(folder / "type").strip() in ("Data", "Unified"):
            factor = units.get(size[-1], 1)
            level = "L" + _text(folder / "level").strip()
            found[level] = int(size.rstrip("KMG")) * factor
    return found


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _pressure() -> float | None:
    """Give the share of the last 10 s in which something waited for a processor."""
    first = _text("/proc/pressure/cpu").partition("\n")[0]
    found = dict(part.partition("=")[::2] for part in first.split()[1:])
    return float(found["avg10"]) / 100 if "avg10" in found else None


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
