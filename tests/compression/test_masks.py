import pytest
import torch

from autoprune.compression.masks import (
    in_tiles,
    kept_by_pattern,
    kept_by_sparsity,
    kept_by_tiles,
    kept_of_group,
    kth_smallest,
    pruned_count,
    smallest,
)
from autoprune.errors import MethodError


def test_counts_round_to_nearest() -> None:
    # int(0.29 * 100) is 28: truncation would lose one.
    counts = [pruned_count(100, 0.29), pruned_count(8, 0.5), pruned_count(3, 0.1)]
    assert counts == [29, 4, 0]


def test_the_smallest_of_each_row_are_marked() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    expected = [[False, True, True, False], [True, True, False, False]]
    assert smallest(scores, 2).tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_of_equal_scores_the_earlier_are_marked(count: int) -> None:
    marked = smallest(torch.ones(3, 4), count)
    assert marked.tolist() == [[column < count for column in range(4)]] * 3


def test_ties_in_one_row_leave_the_others_alone() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    expected = [[True, False, False, True], [False, False, True, True]]
    assert smallest(scores, 2).tolist() == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 16), (3, 1000)], ids=str)
@pytest.mark.parametrize("levels", [2, 10, 10**6], ids="levels={}".format)
def test_selection_equals_a_stable_sort(
    shape: tuple[int, int], levels: int, rng: torch.Generator
) -> None:
    scores = torch.randint(levels, shape, generator=rng).float()
    order = scores.argsort(dim=1, stable=True)
    for count in {0, 1, shape[1] // 3, shape[1]}:
        expected = torch.zeros(shape, dtype=torch.bool)
        expected.scatter_(1, order[:, :count], True)
        assert torch.equal(smallest(scores, count), expected)


def test_kth_smallest_counts_from_one(rng: torch.Generator) -> None:
    scores = torch.rand(4, 9, generator=rng)
    for count in range(1, 10):
        expected = scores.sort(dim=1).values[:, count - 1]
        assert torch.equal(kth_smallest(scores, count), expected)


def test_a_row_competes_with_itself_and_a_layer_as_a_whole() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    by_row = kept_by_sparsity(scores, 0.5, per="row")
    by_layer = kept_by_sparsity(scores, 0.5, per="layer")
    assert by_row.tolist() == [[False, False, True, True]] * 2
    assert by_layer.tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.5, 0.777, 0.99])
def test_kept_counts_are_exact(sparsity: float, rng: torch.Generator) -> None:
    # bfloat16 makes ties, as real weights do.
    scores = torch.rand(24, 100, generator=rng).bfloat16().float()
    by_row = kept_by_sparsity(scores, sparsity, per="row")
    by_layer = kept_by_sparsity(scores, sparsity, per="layer")
    assert (by_row.sum(1) == 100 - round(sparsity * 100)).all()
    assert int(by_layer.sum()) == 2400 - round(sparsity * 2400)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "3:4", "4:8", "5:16", "7:48"])
def test_patterns_keep_the_largest_of_every_group(
    pattern: str, rng: torch.Generator
) -> None:
    keep, of = (int(number) for number in pattern.split(":"))
    scores = torch.randint(20, (6, 96), generator=rng).float()
    kept = kept_by_pattern(scores, pattern).view(-1, of)
    order = scores.view(-1, of).argsort(dim=1, stable=True)
    expected = torch.ones_like(kept).scatter_(1, order[:, : of - keep], False)
    assert torch.equal(kept, expected)


def test_groups_along_the_first_axis_are_the_same() -> None:
    scores = torch.tensor([[1.0, 5.0], [1.0, 4.0], [1.0, 3.0], [2.0, 9.0]])
    expected = [[False, True], [False, False], [True, False], [True, True]]
    assert kept_of_group(scores, 2).tolist() == expected


def test_an_impossible_pattern_is_named() -> None:
    with pytest.raises(MethodError, match="found '4:4'"):
        kept_by_pattern(torch.ones(2, 8), "4:4")


TILES = [(1, 1), (1, 8), (1, 48), (12, 1), (12, 48), (4, 3), (2, 16)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("per", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.8])
def test_tiles_are_kept_whole_in_exact_numbers(
    tile: tuple[int, int], per: str, sparsity: float, rng: torch.Generator
) -> None:
    rows, columns = 12 // tile[0], 48 // tile[1]
    # Few levels make ties: the count holds nevertheless.
    scores = torch.randint(3, (rows, columns), generator=rng).double()
    kept = in_tiles(kept_by_tiles(scores, sparsity, tile, per=per).float(), tile)
    assert kept.shape == (rows, columns, tile[0] * tile[1])
    assert torch.equal(kept.amin(2), kept.amax(2))
    count = columns if per == "row" else rows * columns
    kept_tiles = kept[..., 0].sum(1) if per == "row" else kept[..., 0].sum()
    assert (kept_tiles == count - round(sparsity * count)).all()


def test_of_equal_tiles_the_earlier_go_first() -> None:
    kept = kept_by_tiles(torch.ones(2, 4), 0.5, (1, 2), per="row")
    assert kept.tolist() == [[False] * 4 + [True] * 4] * 2
    kept = kept_by_tiles(torch.ones(2, 4), 0.5, (2, 1), per="layer")
    assert kept.tolist() == [[False] * 4] * 2 + [[True] * 4] * 2


def test_tiles_of_one_weight_are_weights(rng: torch.Generator) -> None:
    scores = torch.rand(6, 20, generator=rng)
    for per in ("row", "layer"):
        expected = kept_by_sparsity(scores, 0.35, per=per)
        assert torch.equal(kept_by_tiles(scores, 0.35, (1, 1), per=per), expected)


def test_tiles_are_lined_up_as_slices_show_them(rng: torch.Generator) -> None:
    weight = torch.rand(6, 8, generator=rng)
    for high, wide in [(2, 4), (3, 2), (6, 1), (1, 8)]:
        found = in_tiles(weight, (high, wide))
        for row in range(6 // high):
            for column in range(8 // wide):
                top, left = row * high, column * wide
                expected = weight[top : top + high, left : left + wide]
                assert torch.equal(found[row, column], expected.flatten().double())


def test_equal_tiles_have_equal_sums_wherever_they_lie(rng: torch.Generator) -> None:
    tile = torch.randn(16, 16, generator=rng)
    sums = in_tiles(tile.repeat(5, 7), (16, 16)).sum(2)
    assert (sums == sums[0, 0]).all()
