"""Sums over inputs are exact, whatever their type and however they are batched."""

import pytest
import torch

from autoprune.models.statistics import (
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
