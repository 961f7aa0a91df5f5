"""A device that does not exist: its constants are known, so a fit can be held to them.

It says nothing of how good predictions are on real hardware.
"""

import math
from collections.abc import Sequence

import numpy as np

from autoprune.latency.kernels import KERNELS, Kernel
from autoprune.latency.profiles import FIT, Point, Profile, split_of
from autoprune.latency.roofline import Roof

ROOF = Roof(compute=8e8, bandwidth=4e6, overhead=3.5)
"""Of the synthetic device: 800 TFLOP/s, 4 TB/s, 3.5 us."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SIDES = (512, 1024, 2048, 4096, 8192, 14336)
SHAPES = tuple((n, k) for n in SIDES for k in SIDES)


def efficiency(n: int, k: int, m: int) -> float:
    """A smooth departure from the roofline, as tiles make it."""
    return 1 + 0.1 * math.sin(math.log2(n)) * math.cos(math.log2(k) + math.log2(m) / 3)


def true_us(kernel: Kernel, m: int, n: int, k: int, gain: float = 1.0) -> float:
    ideal = ROOF.us(kernel.flop(m, n, k) / gain, kernel.moved(m, n, k))
    return ideal * efficiency(n, k, m)


def points(
    name: str,
    *,
    gain: float = 1.0,
    noise: float = 0.0,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    hold_out: bool = False,
) -> list[Point]:
    rng, kernel = np.random.default_rng(0), KERNELS[name]
    found = []
    for n, k in shapes:
        for m in TOKENS:
            us = true_us(kernel, m, n, k, gain) * float(np.exp(noise * rng.normal()))
            split = split_of(name, n, k) if hold_out else FIT
            found.append(Point("gemm", name, us, us, us, 7, m, n, k, split=split))
    return found


def profile(made: Sequence[Point], **device: object) -> Profile:
    about = {"kind": "cuda", "name": "NVIDIA H200", "capability": [9, 0], **device}
    return Profile(
        "synthetic", about, {"torch": "none"}, {}, "2026-11-28T00:00:00Z", made
    )
