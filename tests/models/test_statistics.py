"""Sums over inputs are exact, whatever their type and however they are batched."""

import pytest
import torch

from autoprune.models.statistics import (
    MOST_ROWS,
    NO_STATISTICS,
    STATISTICS,
    Gathering,
    matmul_precision,
)


def inputs(dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(300, 24, generator=rng).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 7, 300])
def test_sums_equal_those_in_double_precision(
    dtype: torch.dtype, batch: int, rng: torch.Generator
) -> None:
    x = inputs(dtype, rng)
    gathering = Gathering(STATISTICS, 24)
    for part in torch.split(x, batch):
        gathering.add(part)
    result = gathering.result()
    exact = x.double()
    assert result.tokens == 300
    assert result.hessian is not None and result.square_sum is not None
    assert result.hessian.dtype == result.square_sum.dtype == torch.float32
    torch.testing.assert_close(
        result.hessian.double(), exact.T @ exact, rtol=2e-6, atol=2e-4
    )
    torch.testing.assert_close(
        result.square_sum.double(), exact.square().sum(0), rtol=2e-6, atol=0
    )
    torch.testing.assert_close(result.square_sum, result.hessian.diagonal())


def test_values_by_hand() -> None:
    gathering = Gathering({"input_norm", "hessian"}, 2)
    gathering.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    result = gathering.result()
    assert result.square_sum is not None and result.hessian is not None
    assert result.square_sum.tolist() == [10.0, 20.0]
    assert result.hessian.tolist() == [[10.0, 14.0], [14.0, 20.0]]


@pytest.mark.parametrize("needs", [set(), {"input_norm"}, {"hessian"}], ids=str)
def test_only_what_is_needed_is_gathered(needs: set[str], rng: torch.Generator) -> None:
    gathering = Gathering(needs, 24)
    gathering.add(inputs(torch.float32, rng))
    result = gathering.result()
    assert result.tokens == 300
    assert (result.square_sum is not None) == ("input_norm" in needs)
    assert (result.hessian is not None) == ("hessian" in needs)


@pytest.mark.parametrize("width", [24, 193, 800], ids=str)
def test_asking_in_between_changes_nothing(width: int, rng: torch.Generator) -> None:
    """The Hessian is completed in place, and grows on: strips of one and of several."""
    once, often = Gathering({"hessian"}, width), Gathering({"hessian"}, width)
    x = torch.randn(60, width, generator=rng)
    for part in torch.split(x, 20):
        once.add(part)
        often.add(part)
        found = often.result().hessian
        assert found is not None and torch.equal(found, found.T)
    expected = once.result().hessian
    assert expected is not None and torch.equal(found, expected)
    torch.testing.assert_close(expected, x.T @ x, rtol=1e-5, atol=1e-4)


def test_inputs_are_left_untouched(rng: torch.Generator) -> None:
    x = inputs(torch.float32, rng)
    before = x.clone()
    Gathering(STATISTICS, 24).add(x)
    assert torch.equal(x, before)


def test_no_tokens_give_zeros() -> None:
    result = Gathering(STATISTICS, 3).result()
    assert result.tokens == NO_STATISTICS.tokens == 0
    assert result.hessian is not None and not result.hessian.any()


def test_a_precision_ends_with_its_block() -> None:
    x = torch.full((64, 64), 1 + 2**-12)  # bfloat16 rounds it to 1
    exact = x @ x

    def fails() -> None:
        with matmul_precision("bf16"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert torch.equal(x @ x, exact)
    with matmul_precision("bf16"), matmul_precision("ieee"):
        assert torch.equal(x @ x, exact)


@pytest.mark.parametrize("batch", [1, 7, 300, 5000])
@pytest.mark.parametrize(("tokens", "stride"), [(40, 1), (MOST_ROWS, 1), (1100, 4)])
def test_tokens_that_are_kept_are_spread_over_all(
    tokens: int, stride: int, batch: int
) -> None:
    x = torch.arange(tokens * 2.0).view(tokens, 2)
    gathering = Gathering({"input_rows"}, 2)
    for part in torch.split(x, batch):
        gathering.add(part)
    rows = gathering.result().input_rows
    assert rows is not None and torch.equal(rows, x[::stride])


def test_tokens_that_are_kept_are_copies() -> None:
    x = torch.ones(3, 2)
    gathering = Gathering({"input_rows"}, 2)
    gathering.add(x)
    x.zero_()
    rows = gathering.result().input_rows
    assert rows is not None and rows.tolist() == [[1.0, 1.0]] * 3
