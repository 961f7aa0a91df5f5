"""Between the points: a synthetic device whose constants are known."""

import numpy as np
import pytest
from latency.synthetic import ROOF, SHAPES, TOKENS, points, profile, true_us

from autoprune.latency.estimate import Z_80, Tier
from autoprune.latency.kernels import KERNELS
from autoprune.latency.roofline import Roof, fit_roof
from autoprune.latency.sources import Measured

BF16 = KERNELS["torch.mm.bf16"]


def test_a_fit_recovers_the_constants_of_a_synthetic_device() -> None:
    rng = np.random.default_rng(0)
    flop, moved = 10 ** rng.uniform(6, 13, 300), 10 ** rng.uniform(4, 9, 300)
    true = np.array([ROOF.us(f, b) for f, b in zip(flop, moved, strict=True)])
    found = fit_roof(flop, moved, true * np.exp(0.05 * rng.normal(size=300)))
    for name in ("compute", "bandwidth", "overhead"):
        assert getattr(found, name) == pytest.approx(getattr(ROOF, name), rel=0.05)


def test_a_few_timings_under_load_do_no_harm() -> None:
    rng = np.random.default_rng(0)
    flop, moved = 10 ** rng.uniform(6, 13, 300), 10 ** rng.uniform(4, 9, 300)
    true = np.array([ROOF.us(f, b) for f, b in zip(flop, moved, strict=True)])
    true[::20] *= 5
    assert fit_roof(flop, moved, true).compute == pytest.approx(ROOF.compute, rel=0.05)


def test_what_was_measured_is_given_back_verbatim() -> None:
    made = points(BF16.name)
    source = Measured(profile(made))
    for point in made[::17]:
        term = source.gemm(BF16, point.m, point.n, point.k)
        assert term.us == point.us
        assert term.tier is Tier.TABLE_EXACT


def test_unseen_shapes_are_told_within_a_few_percent() -> None:
    source = Measured(profile(points(BF16.name, noise=0.02, hold_out=True)))
    errors = []
    for n, k in [(3072, 3072), (6144, 2048), (11008, 4096), (1536, 576)]:
        for m in (1, 3, 24, 96, 700, 5000):
            term = source.gemm(BF16, m, n, k)
            assert term.tier is Tier.TABLE_INTERPOLATED
            errors.append(abs(term.us / true_us(BF16, m, n, k) - 1))
    assert np.mean(errors) < 0.08


def test_told_errors_hold_what_they_promise() -> None:
    names = [f"torch.mm.{short}" for short in ("bf16", "fp16", "fp32")]
    made = [one for name in names for one in points(name, noise=0.05, hold_out=True)]
    source = Measured(profile(made), held_out=True)
    out = [point for point in made if point.split == "holdout"]
    assert len(out) > 100
    inside = 0
    for point in out:
        term = source.gemm(KERNELS[point.kernel], point.m, point.n, point.k)
        assert term.tier is Tier.TABLE_INTERPOLATED
        sigma = np.hypot(term.own, term.shared)
        inside += abs(np.log(term.us / point.us)) < Z_80 * sigma
    assert 0.7 < inside / len(out) < 0.97


def test_more_work_takes_no_less_time() -> None:
    source = Measured(profile(points(BF16.name)))

    def us(m: int, n: int, k: int) -> float:
        return source.gemm(BF16, m, n, k).us

    for n, k in [(700, 700), (3000, 1500), (9000, 5000)]:
        along = [us(m, n, k) for m in (1, 5, 20, 80, 300, 1300, 6000)]
        assert all(b > 0.9 * a for a, b in zip(along, along[1:], strict=False))
        wider = [us(64, round(n * f), k) for f in (1, 1.3, 1.7, 2.2)]
        assert all(b > 0.9 * a for a, b in zip(wider, wider[1:], strict=False))


def test_nothing_is_faster_than_the_ceilings() -> None:
    source = Measured(profile(points(BF16.name)))
    ceiling = Roof(
        max(
            BF16.flop(m, n, k) / true_us(BF16, m, n, k)
            for m in TOKENS
            for n, k in SHAPES
        ),
        max(
            BF16.moved(m, n, k) / true_us(BF16, m, n, k)
            for m in TOKENS
            for n, k in SHAPES
        ),
    )
    for m in (1, 100, 20000):
        for n, k in [(600, 900), (20000, 20000), (128256, 4096)]:
            floor = ceiling.floor(BF16.flop(m, n, k), BF16.moved(m, n, k))
            assert source.gemm(BF16, m, n, k).us >= 0.9 * floor * (1 - 1e-9)


def test_far_from_all_shapes_only_the_roofline_is_left() -> None:
    near = [(n, k) for n, k in SHAPES if max(n, k) <= 1024]
    source = Measured(profile(points(BF16.name, shapes=near)))
    close, far = source.gemm(BF16, 64, 1500, 1024), source.gemm(BF16, 64, 9000, 9000)
    assert far.tier is Tier.ROOFLINE_CALIBRATED
    assert close.tier is Tier.TABLE_INTERPOLATED
    assert (far.own, far.shared) > (close.own, close.shared)
