"""What training the finalists takes, where a run is to do that."""

from functools import partial

from autoprune.planning.disk import pairs_of
from autoprune.planning.outlined import Outlined
from autoprune.planning.rates import Span
from autoprune.planning.work import Work
from autoprune.searching.courses import CourseSpace
from autoprune.searching.recovering import PASSES_OF_TRAINING, REDUCTION
from autoprune.training.course import Course
from autoprune.training.in_turn import KEPT_BYTES
from autoprune.training.schedule import Outline

WEIGHT_BYTES = 4
"""A weight of the copy that is trained, in float32."""

TRAINED_BYTES = 12
"""More for one that is trained: its gradient and two moments."""


def courses_of(outlined: Outlined) -> list[Course]:
    """List the courses that may be carried out; none if nothing is to be trained."""
    recovery, objects = outlined.config.recovery, outlined.plugins.objects
    if recovery is None:
        return []
    known = objects["schedules"], objects["recoveries"]
    parse = partial(Course.parse, schedules=known[0], recoveries=known[1])
    return CourseSpace.parse(recovery.schedules, parse).courses


def training(work: Work) -> Span:
    """Tell how long all courses take on all candidates: in short, a third in full.

    The best case has the cheapest courses alone, the worst one all in full. Of a budget
    of time no more than its share is taken.
    """
    recovery, search = work.outlined.config.recovery, work.outlined.config.search
    courses = courses_of(work.outlined)
    if recovery is None or not courses:
        return Span()
    candidates = min(recovery.candidates, search.finalists)
    tokens = sorted([course.tokens for course in courses] * candidates)
    count = min(len(tokens), recovery.trials or len(tokens))
    mean = sum(tokens) / len(tokens) * count
    short = recovery.short if recovery.short < 1 else 0.0
    full = 1 / REDUCTION if short else 1.0
    each = trained(work, 1_000_000) * 1e-6
    found = Span(
        each.low * sum(tokens[:count]) * (short + full),
        each.middle * mean * (short + full),
        each.high * sum(tokens[-count:]) * (short + 1.0),
    )
    if search.budget is None:
        return found
    most = recovery.share * search.budget
    return Span(min(found.low, most), min(found.middle, most), min(found.high, most))


def trained(work: Work, tokens: int) -> Span:
    """Time the training on so many tokens."""
    return work.measured(tokens) * PASSES_OF_TRAINING


def training_bytes(work: Work) -> float:
    """Tell the memory of a training at the most, activations aside."""
    weights = sum(layer.numel for layer in work.outlined.bench.layers)
    own = sum(layer.numel for layer in {layer for layer, _ in work.pairs})
    return float(WEIGHT_BYTES * weights + TRAINED_BYTES * own)


def checkpoint_bytes(outlined: Outlined) -> int:
    """Tell the most that checkpoints of a course take on the disk."""
    pruning = dict(pairs_of(outlined))
    alike = {layer.block: 0.0 for layer in pruning}
    outline = Outline(pruning, outlined.bench.actions, lambda: alike)
    weights = sum(layer.numel for layer in pruning)
    most = 0.0
    for course in courses_of(outlined):
        phases = len(course.schedule.phases(outline, course.settings))
        own = max(recovery.checkpoint_bytes for recovery, _ in course.recoveries)
        most = max(most, own + KEPT_BYTES * phases * len(course.recoveries))
    return round(most * weights)
