"""Slopes are followed by what the last windows are worth."""

import numpy as np

from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.tracking import tracked

SITES, CHOICES = 60, 5
KINDS = ["a"] * 30 + ["b"] * 30
NOW = np.full(SITES, 2)


def slopes_of(slope, error):
    slope, error = (np.broadcast_to(one, (SITES, CHOICES)) for one in (slope, error))
    slope, error = slope.astype(np.float32), error.astype(np.float32)
    return SiteSlopes(slope, error, np.zeros_like(slope), (0, 1))


def true_slopes(rng):
    found = rng.normal(size=(SITES, CHOICES))
    found[:, 2] = 0
    return found


def noisy(true, size, rng):
    drawn = true + size * rng.normal(size=true.shape)
    drawn[:, 2] = 0
    return slopes_of(drawn, size)


def test_without_noise_the_last_gradient_stands():
    rng = np.random.default_rng(0)
    one, other = (slopes_of(true_slopes(rng), 0.0) for _ in range(2))
    found = tracked([(NOW, one), (NOW, other)], KINDS, 2)
    np.testing.assert_allclose(found, other.slope)


def test_the_first_gradient_stands_as_it_is():
    rng = np.random.default_rng(1)
    seen = noisy(true_slopes(rng), 1.0, rng)
    np.testing.assert_allclose(tracked([(NOW, seen)], KINDS, 2), seen.slope)


def test_what_stands_still_is_averaged_and_what_moved_is_forgotten():
    rng = np.random.default_rng(3)
    true = true_slopes(rng)
    still = [(NOW, noisy(true, 0.5, rng)) for _ in range(6)]
    error = np.abs(tracked(still, KINDS, 2) - true).mean()
    assert error < 0.7 * np.abs(still[-1][1].slope - true).mean()
    moved = 10 * true_slopes(rng)
    found = tracked([*still, (NOW, noisy(moved, 0.5, rng))], KINDS, 2)
    assert np.abs(found - moved).mean() < 1.2 * 0.5


def test_kinds_have_gains_of_their_own():
    rng = np.random.default_rng(4)
    first = true_slopes(rng)
    then = first.copy()
    then[30:] = 10 * true_slopes(rng)[30:]
    sizes = np.full((SITES, CHOICES), 0.5)
    seen = [(NOW, noisy(one, sizes, rng)) for one in (first, first, first, then)]
    found = tracked(seen, KINDS, 2)
    last = seen[-1][1].slope
    assert np.abs(found - then)[:30].mean() < 0.8 * np.abs(last - then)[:30].mean()
    assert np.abs(found - last)[30:].mean() < 0.1


def test_slopes_are_changes_from_where_the_last_incumbent_stands():
    rng = np.random.default_rng(5)
    table = true_slopes(rng)
    later = np.full(SITES, 4)
    moved = table - table[:, 4:5]
    one, other = slopes_of(table, 0.3), slopes_of(moved, 0.3)
    other.slope[:, 4] = 0
    found = tracked([(NOW, one), (later, other)], KINDS, 4)
    assert not found[:, 4].any()
    np.testing.assert_allclose(found[:, :4], moved[:, :4], rtol=1e-5)


def test_choices_that_are_not_there_stay_infinite():
    slope = np.ones((SITES, CHOICES))
    slope[:, 2], slope[3, 4] = 0, np.inf
    found = tracked([(NOW, slopes_of(slope, 0.1))] * 2, KINDS, 2)
    assert np.isinf(found[3, 4]) and np.isfinite(found).sum() == found.size - 1
