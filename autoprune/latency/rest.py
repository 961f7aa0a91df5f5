"""What a block does beside products and attention, learnt from dense models.

Norms, rotations, activations, sums, and what the host adds: what a dense model took
beyond the sum of its parts. It stays when layers shrink and goes with whole blocks.
"""

import numpy as np
from numpy.typing import NDArray

from autoprune.latency.estimate import Estimate
from autoprune.latency.predict import Predictor
from autoprune.latency.profiles import FIT, Point, Profile
from autoprune.latency.sources import Line, Measured
from autoprune.latency.whole_models import dtype_of, shape_of

Array = NDArray[np.float64]


def rest_line(profile: Profile) -> Line | None:
    """Fit the line of a profile; None where no dense model was recorded to fit it on.

    Only dense points of the split ``fit`` are looked at: all others test it.
    """
    points = [
        point
        for op in ("model_prefill", "model_decode")
        for point in profile.of(op, split=FIT)
    ]
    if not points:
        return None
    bare = Predictor(Measured(profile))
    rows, left, weights = [], [], []
    for point in points:
        shape = shape_of(point)
        blocks = sum(block.parts for block in shape.blocks)
        known = pass_of(bare, point).ms * 1e3
        rows.append((blocks, blocks * shape.hidden * point.m))
        left.append(point.us - known)
        weights.append(1 / point.us)  # so that errors are shares of the whole time
    per_block, per_number = _positive_line(
        np.array(rows), np.array(left), np.array(weights)
    )
    return Line(per_block, per_number)


def pass_of(predictor: Predictor, point: Point) -> Estimate:
    """Predict the pass that a point of a whole model timed."""
    new = point.m // point.batch
    dtype, shape = dtype_of(point), shape_of(point)
    return predictor.step(shape, point.batch, new, point.context, dtype=dtype)


def _positive_line(rows: Array, left: Array, weights: Array) -> tuple[float, float]:
    """Solve for two coefficients that are not negative, by weighted least squares."""
    best, least = (0.0, 0.0), float(np.square(left * weights).sum())
    for kept in ([0, 1], [0], [1]):
        found = np.zeros(2)
        scaled = rows[:, kept] * weights[:, None]
        found[kept] = np.linalg.lstsq(scaled, left * weights, rcond=None)[0]
        loss = float(np.square((rows @ found - left) * weights).sum())
        if (found >= 0).all() and loss < least:
            best, least = (float(found[0]), float(found[1])), loss
    return best
