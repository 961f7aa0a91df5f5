"""What operations take inside of whole models, learnt from dense ones.

A dense model takes longer than the sum of its parts: some of that goes with the work
(cold caches, lower clocks), some with the blocks (the host, the cache, copies). Which
is which shows in passes of few and of many tokens.
"""

import numpy as np
from numpy.typing import NDArray

from autoprune.latency.estimate import Estimate
from autoprune.latency.predict import Predictor
from autoprune.latency.profiles import FIT, Point, Profile
from autoprune.latency.sources import InModels, Measured
from autoprune.latency.whole_models import dtype_of, shape_of

Array = NDArray[np.float64]

SLOWDOWNS = np.arange(1.0, 1.5, 0.005)
"""How many times as long operations may take inside of a model."""


def inside_models(profile: Profile) -> InModels | None:
    """Fit what a profile tells of dense models; None where none was recorded.

    By the least sum of absolute errors of the logarithm, which a single pass under load
    does not move. Only dense points of the split ``fit`` are looked at; others test.
    """
    points = [
        point
        for op in ("model_prefill", "model_decode")
        for point in profile.of(op, split=FIT)
    ]
    if not points:
        return None
    bare = Predictor(Measured(profile))
    parts = np.array([pass_of(bare, point).ms * 1e3 for point in points])
    blocks = np.array([sum(b.parts for b in shape_of(p).blocks) for p in points])
    return _fitted(parts, blocks, np.array([point.us for point in points]))


def pass_of(predictor: Predictor, point: Point) -> Estimate:
    """Predict the pass that a point of a whole model timed."""
    new = point.m // point.batch
    dtype, shape = dtype_of(point), shape_of(point)
    return predictor.step(shape, point.batch, new, point.context, dtype=dtype)


def _fitted(parts: Array, blocks: Array, us: Array) -> InModels:
    """Try every slowdown, with what it leaves for a block by each of the passes."""
    best, least = InModels(0.0), np.inf
    for slowdown in SLOWDOWNS:
        left = np.maximum((us - slowdown * parts) / blocks, 0.0)
        for per_block in left:
            found = slowdown * parts + per_block * blocks
            loss = float(np.abs(np.log(found / us)).sum())
            if loss < least:
                best, least = InModels(float(per_block), float(slowdown)), loss
    return best
