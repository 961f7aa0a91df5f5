"""What few draws say of curvatures is steadied by what all pairs say."""

import numpy as np
import pytest

from autoprune.searching.curvature import LIKE_ITS_KIND, kind_of, steadied


def test_a_kind_is_scaled_to_its_draws_and_a_site_a_little_to_its_own():
    raw = np.array([[0.0, 6.0], [0.0, 2.0], [0.0, 5.0]])
    crossed = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 10.0]])
    found = steadied(raw, crossed, ["v", "v", "o"], draws=4)
    # v: 8 of draws for 2 of pairs, so 4; its sites 6 and 2, worth 4 draws beside 16.
    share = 4 / (4 + LIKE_ITS_KIND)
    expected = [[0, 4 + 2 * share], [0, 4 - 2 * share], [0, 5]]
    np.testing.assert_allclose(found, expected)


def test_where_nothing_is_known_of_pairs_draws_stand():
    raw = np.array([[0.0, 3.0], [0.0, 7.0]])
    crossed = np.array([[0.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(steadied(raw, crossed, ["a", "a"], 2), raw)
    assert not steadied(np.zeros((2, 2)), np.zeros((2, 2)), ["a", "a"], 0).any()


def test_it_is_nearer_to_the_truth_than_draws_and_than_pairs():
    """Sites of two kinds, whose pairs are off by a half and by a third."""
    rng = np.random.default_rng(0)
    true = rng.lognormal(size=(40, 1)) * np.arange(1, 6)
    bias = np.repeat([0.5, 3.0], 20)[:, None] * rng.lognormal(0, 0.2, size=(40, 1))
    draws = 4
    squares = rng.chisquare(draws, size=(40, 1)) / draws  # levels of a site go together
    kinds = ["a"] * 20 + ["b"] * 20
    found = steadied(true * squares, true * bias, kinds, draws)

    def off(said):
        return np.abs(np.log(said / true)).mean()

    assert off(found) < 0.5 * off(true * squares)
    assert off(found) < 0.5 * off(true * bias)


@pytest.mark.parametrize(
    ("site", "kind"),
    [
        ("blocks.3.qkv", "blocks.*.qkv"),
        ("head", "head"),
        ("b.0.e.12.up", "b.*.e.*.up"),
        ("blocks.3.down_proj[12]", "blocks.*.down_proj[*]"),
        ("blocks.3.fc1", "blocks.*.fc1"),
        ("blocks.3.w2", "blocks.*.w2"),
    ],
)
def test_sites_that_differ_in_numbers_are_of_one_kind(site, kind):
    assert kind_of(site) == kind
