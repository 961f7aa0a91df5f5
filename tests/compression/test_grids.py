import pytest
import torch

from autoprune.compression.grids import fit_grid, grid_of_range, nearest_codes

BITS = range(2, 9)
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def rounded(
    weight: torch.Tensor,
    *,
    bits: int,
    group: int | None = None,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales, zeros = fit_grid(
        weight, bits=bits, group=group, symmetric=symmetric, dtype=dtype
    )
    codes = nearest_codes(weight, scales, zeros, bits=bits)
    grouped = codes.view(*scales.shape, -1) - zeros[..., None]
    return (grouped * scales[..., None]).view(weight.shape), scales, codes


def test_a_range_worked_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.4, 2.0]])
    scales, zeros = fit_grid(
        weight, bits=2, group=None, symmetric=False, dtype=torch.float32
    )
    assert (scales.tolist(), zeros.tolist()) == ([[1.0]], [[1.0]])
    assert nearest_codes(weight, scales, zeros, bits=2).tolist() == [[0, 1, 1, 3]]


def test_a_symmetric_range_worked_by_hand() -> None:
    weight = torch.tensor([[-1.5, 0.0, 0.6, 1.0]])
    scales, zeros = fit_grid(
        weight, bits=2, group=None, symmetric=True, dtype=torch.float32
    )
    assert (scales.tolist(), zeros.tolist()) == ([[1.0]], [[2.0]])
    assert nearest_codes(weight, scales, zeros, bits=2).tolist() == [[0, 2, 3, 3]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_no_weight_is_off_by_more_than_half_a_stored_step(
    bits: int, symmetric: bool, dtype: torch.dtype, rng: torch.Generator
) -> None:
    weight = torch.randn(64, 96, generator=rng) * 0.03
    result, scales, _ = rounded(
        weight, bits=bits, group=32, symmetric=symmetric, dtype=dtype
    )
    assert torch.equal(scales, scales.to(dtype).float())
    off = (result - weight).abs().view(64, 3, 32) / scales[..., None]
    assert off.max() <= 0.5 + 1e-4  # what float32 cannot tell apart


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0], ids="shift={}".format)
def test_zero_is_on_the_grid(bits: int, shift: float, rng: torch.Generator) -> None:
    weight = torch.randn(16, 32, generator=rng) + shift
    weight[:, ::5] = 0.0
    for symmetric in (False, True):
        result, _, _ = rounded(weight, bits=bits, symmetric=symmetric)
        assert not result[:, ::5].any()


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7], ids=str)
def test_a_constant_group_is_exact(value: float) -> None:
    weight = torch.full((2, 8), value)
    result, scales, _ = rounded(weight, bits=3, group=4)
    torch.testing.assert_close(result, weight)
    assert (scales > 0).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tiny_weights_give_no_zero_scale(dtype: torch.dtype) -> None:
    scale, zero = grid_of_range(
        torch.tensor([-1e-12]),
        torch.tensor([1e-12]),
        bits=8,
        symmetric=False,
        dtype=dtype,
    )
    assert scale > 0 and torch.isfinite(zero).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_scales_are_rounded_up_to_the_next_number(
    dtype: torch.dtype, rng: torch.Generator
) -> None:
    high = torch.rand(10_000, generator=rng) + 0.01
    scale, _ = grid_of_range(
        torch.zeros_like(high), high, bits=2, symmetric=False, dtype=dtype
    )
    exact = high / 3
    assert (scale >= exact).all()
    assert (scale - exact <= exact * torch.finfo(dtype).eps).all()


def test_more_bits_never_err_more(rng: torch.Generator) -> None:
    weight = torch.randn(32, 64, generator=rng)
    errors = [float((rounded(weight, bits=b)[0] - weight).norm()) for b in BITS]
    assert errors == sorted(errors, reverse=True)
