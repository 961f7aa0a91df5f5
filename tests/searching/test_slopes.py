from dataclasses import replace

import numpy as np
import pytest
import torch

from autoprune.evaluation.slopes import LayerSlopes
from autoprune.policy import Action, Layer, Site
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.space import SearchSpace

INF = np.inf


def layer(name):
    return Layer(name, (4, 4), "float32", 0, name, None)


def space_of():
    """A fused site of two layers, one of one layer, one without a choice."""
    sites = (
        Site("qk", (layer("q"), layer("k"))),
        Site("up", (layer("up"),)),
        Site("fixed", (layer("o"),)),
    )
    actions = tuple(Action.parse(f"wanda(sparsity=0.{i})") for i in (1, 2, 3))
    choices = {"qk": actions[:2], "up": actions, "fixed": actions[:1]}
    return SearchSpace(sites, choices)


def slopes_of(kl, score):
    score = torch.tensor(score) if score else torch.empty(0, len(kl[0]))
    return LayerSlopes(torch.tensor(kl), score)


def layers_of():
    return {
        layer("q"): slopes_of([[1.0, 0.0], [3.0, 0.0]], [[1.0, 0.0], [2.0, 0.0]]),
        layer("k"): slopes_of([[4.0, 0.0], [-2.0, 0.0]], [[-3.0, 0.0], [2.0, 0.0]]),
        layer("up"): slopes_of([[0.0, 2.0, 5.0], [0.0, 2.0, 9.0]], [[0.0, 2.0, 4.0]]),
    }


def test_layers_of_a_fused_site_are_added_before_they_are_squared():
    found = SiteSlopes.of(space_of(), layers_of(), [5, 2])
    # qk: windows 1 + 4 and 3 - 2, mean 3, spread 4 / sqrt(2), error that / sqrt(2).
    np.testing.assert_array_equal(
        found.slope, [[3.0, 0.0, INF], [0.0, 2.0, 7.0], [0.0, INF, INF]]
    )
    np.testing.assert_allclose(
        found.error, [[2.0, 0.0, INF], [0.0, 0.0, 2.0], [0.0, INF, INF]], rtol=1e-7
    )
    # qk: draws 1 - 3 and 2 + 2, half their mean square (4 + 16) / 4.
    np.testing.assert_array_equal(
        found.curvature, [[5.0, 0.0, INF], [0.0, 2.0, 8.0], [0.0, INF, INF]]
    )
    assert found.windows == (5, 2)


def test_without_draws_there_is_no_curvature_and_of_one_window_no_error():
    layers = {
        one: LayerSlopes(slopes.kl[:1], slopes.score[:0])
        for one, slopes in layers_of().items()
    }
    found = SiteSlopes.of(space_of(), layers, [3])
    assert found.slope[0, 0] == 5.0
    for table in (found.error, found.curvature):
        np.testing.assert_array_equal(
            table, [[0.0, 0.0, INF], [0.0, 0.0, 0.0], [0.0, INF, INF]]
        )


def test_slopes_on_further_windows_are_averaged_by_their_number():
    one = SiteSlopes.of(space_of(), layers_of(), [5, 2])
    other = SiteSlopes.of(space_of(), layers_of(), [0])
    error = np.where(np.isinf(other.slope), np.inf, 6).astype(np.float32)
    other = replace(other, slope=other.slope + 3, error=error)
    both = one.joined(other)
    assert both.windows == (5, 2, 0)
    np.testing.assert_allclose(both.slope, one.slope + 1, rtol=1e-6)
    np.testing.assert_allclose(both.curvature, one.curvature, rtol=1e-6)
    # Errors of 2 on two windows and 6 on one: the root of (2 * 2 / 3)^2 + (6 / 3)^2.
    assert both.error[0, 0] == pytest.approx((16 / 9 + 4) ** 0.5)
    assert both.slope.dtype == both.error.dtype == np.float32
    assert np.isinf(both.slope[0, 2]) and np.isinf(both.curvature[0, 2])


def test_bytes_give_the_same_bits_back():
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(3, 7, 5)).astype(np.float32)
    tables[:, 2, 3:] = np.inf
    tables[:, 0, 0] = np.float32(1e-42)  # subnormal
    slopes = SiteSlopes(*tables, (4, 0, 23))
    again = SiteSlopes.from_bytes(slopes.to_bytes())
    for name in ("slope", "error", "curvature"):
        one, other = getattr(slopes, name), getattr(again, name)
        assert one.dtype == other.dtype == np.float32
        assert one.tobytes() == other.tobytes()
    assert again.windows == (4, 0, 23)
    assert all(type(window) is int for window in again.windows)
    assert slopes.to_bytes() == again.to_bytes()


@pytest.mark.parametrize("count", [1, 3])
def test_tables_are_float32_as_they_are_stored(count):
    found = SiteSlopes.of(space_of(), {}, range(count))
    assert {found.slope.dtype, found.error.dtype} == {np.dtype("float32")}
    np.testing.assert_array_equal(found.slope[1], [0.0, 0.0, 0.0])
