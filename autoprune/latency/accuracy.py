"""How good predictions are: held-out shapes and whole models, each beside the truth.

Whole shapes are held out by a hash, before any fit; whole models are never fitted but
for the dense one that tells what lies between products.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.latency.estimate import Estimate, compare
from autoprune.latency.inside import inside_models, pass_of
from autoprune.latency.kernels import KERNELS
from autoprune.latency.predict import Predictor
from autoprune.latency.profiles import HOLDOUT, VALIDATION, Point, Profile
from autoprune.latency.sources import Measured

REGIMES = ((1, 16), (17, 256), (257, 1 << 30))
"""Tokens that are told apart: few, some, many."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors of one sort of prediction.

    Attributes:
        what: Kernel or kind of model, and the tokens.
        count: Predictions.
        mape: Mean absolute error, as a share of the true time.
        median: Median absolute error.
        p90: Nine of ten errors are smaller.
        bias: Median signed error; positive where predictions are too slow.
        spearman: Rank correlation of prediction and truth; NaN for under three.
        coverage: Share of the true times within the interval for 80 %.
    """

    what: str
    count: int
    mape: float
    median: float
    p90: float
    bias: float
    spearman: float
    coverage: float


def accuracy_of(profile: Profile) -> list[Accuracy]:
    """Test the tables of a profile on the shapes that were held out."""
    source = Measured(profile, held_out=True)
    found = []
    for name in dict.fromkeys(point.kernel for point in profile.of("gemm")):
        if name not in source.tables:
            continue
        for low, high in REGIMES:
            pairs = [
                (_gemm(source, point), point.us)
                for point in profile.of("gemm", split=HOLDOUT)
                if point.kernel == name and low <= point.m <= high
            ]
            label = f"{name}, {low}-{high} tokens" if high < 1 << 30 else None
            found += _judged(label or f"{name}, from {low} tokens", pairs)
    return found


def accuracy_of_ratios(profile: Profile, dense: str) -> list[Accuracy]:
    """Test predicted speed-ups over a dense kernel on the shapes held out for both."""
    source = Measured(profile, held_out=True)
    base = {(p.m, p.n, p.k): p for p in profile.of("gemm") if p.kernel == dense}
    found = []
    for name in source.tables:
        pairs = []
        for point in profile.of("gemm", split=HOLDOUT):
            other = base.get((point.m, point.n, point.k))
            if point.kernel == name != dense and other is not None:
                ratio = compare(_gemm(source, point), _gemm(source, other))
                ends = (ratio.value, ratio.low, ratio.high)
                pairs.append((ends, point.us / other.us))
        found += _judged(f"{name} over {dense}", pairs)
    return found


def sign_accuracy(profile: Profile, sparse: str, dense: str) -> tuple[float, float]:
    """Tell how often it is foretold whether 2:4 is faster, beside the base rate.

    Returns:
        The share of held-out shapes foretold rightly, and what always giving the
        commoner answer would reach; NaN without any shape.
    """
    source = Measured(profile, held_out=True)
    base = {(p.m, p.n, p.k): p for p in profile.of("gemm") if p.kernel == dense}
    right, faster = [], []
    for point in profile.of("gemm", split=HOLDOUT):
        other = base.get((point.m, point.n, point.k))
        if point.kernel == sparse and other is not None:
            foretold = _gemm(source, point).ms < _gemm(source, other).ms
            faster.append(point.us < other.us)
            right.append(foretold == faster[-1])
    if not right:
        return float("nan"), float("nan")
    share = float(np.mean(faster))
    return float(np.mean(right)), max(share, 1 - share)


def accuracy_of_models(profile: Profile) -> list[Accuracy]:
    """Test whole models: each kind by itself, and all together."""
    predictor = Predictor(Measured(profile, inside_models(profile)))
    found, everything = [], []
    for op in ("model_prefill", "model_decode"):
        points = profile.of(op, split=VALIDATION)
        for name in dict.fromkeys(point.kernel for point in points):
            pairs = [
                (pass_of(predictor, point), point.us)
                for point in points
                if point.kernel == name
            ]
            found += _judged(f"{op} {name}", pairs)
            everything += pairs
    return [*found, *_judged("all models", everything)]


def _gemm(source: Measured, point: Point) -> Estimate:
    kernel = KERNELS[point.kernel]
    return Estimate({source.gemm(kernel, point.m, point.n, point.k): 1.0})


_Ends = tuple[float, float, float]


def _judged(
    what: str, pairs: Sequence[tuple[Estimate | _Ends, float]]
) -> list[Accuracy]:
    """Judge predictions against true microseconds, or ratios against ratios."""
    if not pairs:
        return []
    ends = [_ends(foretold) for foretold, _ in pairs]
    values = np.array([value for value, _, _ in ends])
    true = np.array([truth for _, truth in pairs])
    errors = values / true - 1
    inside = [low <= t <= high for (_, low, high), t in zip(ends, true, strict=True)]
    return [
        Accuracy(
            what,
            len(pairs),
            float(np.abs(errors).mean()),
            float(np.median(np.abs(errors))),
            float(np.quantile(np.abs(errors), 0.9)),
            float(np.median(errors)),
            _spearman(values, true),
            float(np.mean(inside)),
        )
    ]


def _ends(foretold: Estimate | _Ends) -> _Ends:
    if isinstance(foretold, tuple):
        return foretold
    low, high = foretold.interval
    return foretold.ms * 1e3, low * 1e3, high * 1e3


def _spearman(one: Iterable[float], other: Iterable[float]) -> float:
    """Correlate ranks; without scipy, which has no home in this room."""
    ranks = [np.argsort(np.argsort(np.array(list(x)))) for x in (one, other)]
    if len(ranks[0]) < 3:
        return float("nan")
    first, second = (rank - rank.mean() for rank in ranks)
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))
