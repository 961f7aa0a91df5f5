"""What data sheets say of GPUs: where nothing was measured, the last resort.

Dense figures in TFLOP/s (TOP/s for int8) with 32-bit accumulation, gigabytes a second,
megabytes. Pages that print figures with sparsity as if they were dense are many; these
are halved where it was so. L2 sizes are not used for time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from autoprune.errors import ProfileError


@dataclass(frozen=True, slots=True)
class Datasheet:
    """One GPU on paper.

    Attributes:
        name: Short and lower case.
        capability: Compute capability.
        tera: Operations a second in 1e12, by the type that is computed in.
        gigabytes_s: Memory bandwidth.
        memory_gb: Memory.
    """

    name: str
    capability: tuple[int, int]
    tera: Mapping[str, float] = field(hash=False)
    gigabytes_s: float
    memory_gb: float


def _gpu(
    name: str,
    capability: tuple[int, int],
    half: float,
    eight: float,
    gigabytes_s: float,
    memory_gb: float,
    *,
    fp8: float = 0.0,
    fp32: float,
) -> Datasheet:
    tera = {"bf16": half, "fp16": half, "int8": eight, "fp32": fp32}
    if fp8:
        tera["fp8"] = fp8
    return Datasheet(name, capability, tera, gigabytes_s, memory_gb)


DATASHEETS = {
    sheet.name: sheet
    for sheet in (
        _gpu("a100", (8, 0), 312, 624, 2039, 80, fp32=19.5),
        _gpu("a100-40gb", (8, 0), 312, 624, 1555, 40, fp32=19.5),
        _gpu("a100-pcie", (8, 0), 312, 624, 1935, 80, fp32=19.5),
        _gpu("a30", (8, 0), 165, 330, 933, 24, fp32=10.3),
        _gpu("a10", (8, 6), 125, 250, 600, 24, fp32=31.2),
        _gpu("rtx-3090", (8, 6), 71, 284, 936, 24, fp32=35.6),
        _gpu("l4", (8, 9), 121, 242, 300, 24, fp8=242, fp32=30.3),
        _gpu("l40s", (8, 9), 362, 733, 864, 48, fp8=733, fp32=91.6),
        _gpu("rtx-4090", (8, 9), 165, 661, 1008, 24, fp8=330, fp32=82.6),
        _gpu("rtx-5090", (12, 0), 210, 838, 1792, 32, fp8=419, fp32=104.8),
        _gpu("h100", (9, 0), 989, 1979, 3350, 80, fp8=1979, fp32=67),
        _gpu("h100-pcie", (9, 0), 756, 1513, 2000, 80, fp8=1513, fp32=51),
        _gpu("h200", (9, 0), 989, 1979, 4800, 141, fp8=1979, fp32=67),
        _gpu("b200", (10, 0), 2250, 4500, 7700, 180, fp8=4500, fp32=75),
    )
}
"""Every GPU that is known on paper, by name."""


def find_datasheet(name: str) -> Datasheet:
    """Look up a GPU by its short name, or by what its driver calls it.

    Raises:
        ProfileError: If it is not known.

    Example:
        >>> find_datasheet("NVIDIA H200").name, find_datasheet("rtx 4090").name
        ('h200', 'rtx-4090')
    """
    wanted = _plain(name)
    if wanted in DATASHEETS:
        return DATASHEETS[wanted]
    # The longest name first: an "H100 PCIe" is no H100.
    for known in sorted(DATASHEETS, key=len, reverse=True):
        if set(known.split("-")) <= set(wanted.split("-")):
            return DATASHEETS[known]
    near = get_close_matches(wanted, DATASHEETS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ProfileError(
        f"nothing is known of the device {name!r}.{hint} Known by their data sheets: "
        f"{', '.join(DATASHEETS)}. Measure yours with `autoprune profile`"
    )


def _plain(name: str) -> str:
    words = name.lower().replace("geforce", "").replace("nvidia", "").split()
    return "-".join(words)
