"""What operations take inside of whole models, learnt from dense ones.

A dense model takes longer than the sum of its parts. With few tokens that is what a
block takes beside: the host, the cache, copies. With many, operations take longer than
alone: what they read was written by others, and clocks are lower.
"""

import numpy as np
from numpy.typing import NDArray

from autoprune.latency.estimate import Estimate
from autoprune.latency.predict import Predictor
from autoprune.latency.profiles import FIT, Point, Profile
from autoprune.latency.sources import FEW_TOKENS, InModels, Measured
from autoprune.latency.whole_models import dtype_of, shape_of

Array = NDArray[np.float64]


def inside_models(profile: Profile) -> InModels | None:
    """Fit what a profile tells of dense models; None where none was recorded.

    By medians, which a single pass under load does not move. Only dense points of the
    split ``fit`` are looked at; all others test.
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
    us = np.array([point.us for point in points])
    few = np.array([point.m <= FEW_TOKENS for point in points])
    per_block = _median((us - parts)[few] / blocks[few], 0.0)
    slowdown = _median((us - per_block * blocks)[~few] / parts[~few], 1.0)
    return InModels(per_block, slowdown)


def pass_of(predictor: Predictor, point: Point) -> Estimate:
    """Predict the pass that a point of a whole model timed."""
    new = point.m // point.batch
    dtype, shape = dtype_of(point), shape_of(point)
    return predictor.step(shape, point.batch, new, point.context, dtype=dtype)


def _median(values: Array, least: float) -> float:
    """Give the median, but no less than ``least``; that of nothing is ``least``."""
    return max(float(np.median(values)), least) if len(values) else least
