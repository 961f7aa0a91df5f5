"""The surgeon's steps against least squares done by hand."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from autoprune.compression.factor import factorise
from autoprune.compression.obs import (
    PANEL,
    Grid,
    Rows,
    Trace,
    best_on_support,
    counts_of_layer,
    inverse_and_hessian,
    remove_greedily,
    round_greedily,
)
from autoprune.testing import tiny_source, tiny_statistics


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Give weights, a Hessian and its inverse, in float64."""
    weight = tiny_source((rows, columns), seed=seed).variant.weight.double()
    statistics = tiny_statistics(columns, seed=seed)
    assert statistics.hessian is not None
    hessian = statistics.hessian.double()
    hessian = (hessian + hessian.T) / 2
    return weight, hessian, hessian.inverse()


def least_squares(row: Tensor, support: list[int], hessian: Tensor) -> Tensor:
    """Solve for one row on its support through explicit inputs."""
    inputs = torch.linalg.cholesky(hessian).T  # its XᵀX is the Hessian
    best = torch.zeros_like(row)
    if support:
        target = (inputs @ row)[:, None]
        best[support] = torch.linalg.lstsq(inputs[:, support], target).solution[:, 0]
    return best


def loss(row: Tensor, other: Tensor, hessian: Tensor) -> float:
    return float((row - other) @ hessian @ (row - other))


def test_a_factor_gives_back_the_damped_hessian_and_its_inverse() -> None:
    hessian = tiny_statistics(24).hessian
    assert hessian is not None
    factor = factorise(hessian, damping=0.1, act_order=False, names=["q"])
    inverse, damped = inverse_and_hessian(factor)
    expected = hessian.double()
    expected += 0.1 * expected.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(damped, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(inverse @ damped, torch.eye(24).double())


def test_two_weights_worked_by_hand() -> None:
    # Inputs that are nearly the same: removing the first costs little, since the
    # second takes over h_12 / h_22 of it.
    hessian = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()
    rows = Rows(torch.tensor([[3.0, 4.0]]), hessian.inverse())
    cost = rows.settle(torch.tensor([0]), torch.zeros(1).double())
    assert cost.tolist() == [pytest.approx(9.0)]  # 3² (2 - 1² / 1)
    assert rows.weights.tolist() == [[0.0, pytest.approx(7.0)]]
    assert rows.diagonal[0, 1] == pytest.approx(1.0)  # the inverse of h_22 alone


def test_every_removal_is_the_best_single_one() -> None:
    weight, hessian, inverse = problem(3, 7)
    trace = remove_greedily(weight, inverse, 7)
    for row, order, losses in zip(weight, trace.order, trace.losses, strict=True):
        left, before = list(range(7)), 0.0
        for gone, found in zip(order.tolist(), losses.tolist(), strict=True):
            rivals = {
                column: loss(
                    row,
                    least_squares(row, [c for c in left if c != column], hessian),
                    hessian,
                )
                for column in left
            }
            assert gone == min(rivals, key=lambda column: rivals[column])
            assert found == pytest.approx(rivals[gone] - before, rel=1e-6, abs=1e-6)
            before = rivals[gone]
            left.remove(gone)


def test_survivors_are_always_the_least_squares_on_their_support() -> None:
    weight, hessian, inverse = problem(4, 3 * PANEL)  # panels that fill up, and more
    rows = Rows(weight, inverse)
    order = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    for step, at in enumerate(order.argsort(1).T):
        rows.settle(at, torch.zeros(4).double())
        if step % 11 == 0:
            expected = best_on_support(weight, rows.free, hessian)
            torch.testing.assert_close(rows.weights, expected)
    assert not rows.weights.any()


def test_the_best_on_a_support_is_least_squares() -> None:
    weight, hessian, _ = problem(5, 12)
    kept = torch.rand(5, 12, generator=torch.Generator().manual_seed(2)) < 0.4
    kept[3] = False
    kept[4] = True
    best = best_on_support(weight, kept, hessian)
    for row, mask, found in zip(weight, kept, best, strict=True):
        support = mask.nonzero()[:, 0].tolist()
        torch.testing.assert_close(found, least_squares(row, support, hessian))


def test_losses_add_up_to_the_output_error() -> None:
    weight, hessian, inverse = problem(6, 40)
    trace = remove_greedily(weight, inverse, 25)
    kept = trace.kept(torch.full((6,), 25), 40)
    change = weight - best_on_support(weight, kept, hessian)
    error = ((change @ hessian) * change).sum(1)
    torch.testing.assert_close(trace.losses.sum(1), error)


def test_greedy_is_near_the_best_of_all_supports() -> None:
    weight, hessian, inverse = problem(2, 8)
    trace = remove_greedily(weight, inverse, 4)
    for row, losses in zip(weight, trace.losses, strict=True):
        best = min(
            loss(row, least_squares(row, list(support), hessian), hessian)
            for support in combinations(range(8), 4)
        )
        assert best <= float(losses.sum()) * (1 + 1e-9) <= 1.5 * best


def test_a_pattern_never_loses_more_of_a_group() -> None:
    weight, _, inverse = problem(3, 16)
    trace = remove_greedily(weight, inverse, 12, pattern="1:4")
    kept = trace.kept(torch.full((3,), 12), 16)
    assert (kept.view(3, 4, 4).sum(2) == 1).all()


def test_a_layer_takes_the_cheapest_prefixes() -> None:
    # The dip of the second row cannot be had without the 5 before it.
    losses = torch.tensor([[1.0, 2.0, 6.0], [5.0, 0.5, 7.0]])
    counts = [counts_of_layer(losses, removed).tolist() for removed in range(7)]
    assert counts == [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [3, 2], [3, 3]]
    trace = Trace(torch.tensor([[2, 0, 1], [1, 2, 0]]), losses)
    kept = trace.kept(torch.tensor([2, 1]), 3)
    assert kept.tolist() == [[False, True, False], [True, False, True]]


def test_rounding_settles_every_weight_at_its_grid() -> None:
    weight, hessian, _ = problem(4, 20)
    kept = torch.rand(4, 20, generator=torch.Generator().manual_seed(3)) < 0.6
    best = best_on_support(weight, kept, hessian)
    full = torch.ones(4, 20)
    grid = Grid(0.25 * full, -8 * full, 7 * full)
    found = round_greedily(best, kept, hessian, grid)
    assert torch.equal(found, found.round()) and not found[~kept].any()
    assert found.min() >= -8 and found.max() <= 7

    def error(weights: Tensor) -> float:
        change = weight - weights
        return float(((change @ hessian) * change).sum())

    assert error(found * 0.25) < error(grid.nearest(best) * 0.25)


def test_rounding_takes_the_cheapest_weight_first() -> None:
    weight, hessian, _ = problem(1, 6)
    full = torch.ones(1, 6)
    grid = Grid(0.5 * full, -16 * full, 15 * full)  # wide: none drifts off its end
    found = round_greedily(weight, full.bool(), hessian, grid)[0] * 0.5
    row, left = weight[0].clone(), list(range(6))
    while left:  # the same, with every candidate's loss from least squares
        best, cost = row, torch.inf
        gone = left[0]
        for column in left:
            fixed = row.clone()
            fixed[column] = (row[column] / 0.5).round() * 0.5
            others = [c for c in left if c != column]
            lost = torch.zeros(6).double()
            lost[column] = row[column] - fixed[column]
            fixed += least_squares(lost, others, hessian)
            if loss(row, fixed, hessian) < cost:
                best, cost, gone = fixed, loss(row, fixed, hessian), column
        row = best
        left.remove(gone)
    torch.testing.assert_close(found, row)


def test_rounding_without_dependence_is_rounding_to_nearest() -> None:
    weight = problem(4, 20)[0]
    full = torch.ones(4, 20)
    grid, kept = Grid(0.25 * full, -8 * full, 7 * full), full.bool()
    found = round_greedily(weight, kept, torch.eye(20).double(), grid)
    assert torch.equal(found, grid.nearest(weight))
