import pytest
import torch

from autoprune.compression.codebooks import (
    decode,
    encode,
    nearest,
    scales_from_bytes,
    scales_to_bytes,
)
from autoprune.compression.formats import FORMATS

BOOKS = [name for name, form in FORMATS.items() if form.values]


@pytest.mark.parametrize("name", BOOKS)
def test_every_number_of_a_book_is_its_own_nearest(name: str) -> None:
    form = FORMATS[name]
    codes = torch.arange(len(form.values)).byte()
    numbers = decode(codes, form)
    usable = ~numbers.isnan() & ~((numbers == 0) & numbers.signbit())
    assert torch.equal(nearest(numbers[usable], form), codes[usable])


@pytest.mark.parametrize("name", BOOKS)
def test_nearest_is_what_brute_force_finds(name: str, rng: torch.Generator) -> None:
    form = FORMATS[name]
    numbers = torch.randn(500, generator=rng) * form.top / 2
    values = torch.tensor(form.values)
    gaps = torch.nan_to_num((numbers[:, None] - values).abs(), torch.inf)
    found = (numbers - decode(nearest(numbers, form), form)).abs()
    assert torch.equal(found, gaps.amin(1))


def test_e4m3_rounds_as_torch_does(rng: torch.Generator) -> None:
    sizes = torch.exp2(torch.randint(-14, 9, (5000,), generator=rng).float())
    numbers = (torch.randn(5000, generator=rng) * sizes).clamp(-448, 448)
    ties = torch.tensor([17.0, 19.0, 1.0625, 2**-10, 3 * 2**-10])  # to even mantissas
    numbers = torch.cat([numbers, ties, -ties[:3]])
    form = FORMATS["fp8_e4m3"]
    torch_says = numbers.to(torch.float8_e4m3fn).float()
    assert torch.equal(decode(nearest(numbers, form), form), torch_says)


def test_e2m1_ties_go_to_even_mantissas_and_ends_stay() -> None:
    form = FORMATS["mxfp4"]
    numbers = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 7.9, -0.2])
    found = decode(nearest(numbers, form), form)
    assert found.tolist() == [0, 1, 1, 2, 2, 4, 4, -4, 6, 0]
    assert not found[-1].signbit()


def test_bytes_hold_scales_exactly() -> None:
    powers = torch.exp2(torch.arange(-126.0, 128.0)).view(1, -1)
    assert torch.equal(
        scales_from_bytes(scales_to_bytes(powers, "e8m0"), "e8m0"), powers
    )
    floats = torch.arange(1, 127).byte().view(1, -1)
    assert torch.equal(
        scales_to_bytes(scales_from_bytes(floats, "e4m3"), "e4m3"), floats
    )


def test_mxfp4_scales_follow_the_standard() -> None:
    """OCP MX v1.0: the largest power of two in a group, over that of 6."""
    weight = torch.zeros(1, 128)
    weight[0, 0], weight[0, 32], weight[0, 64] = 6.0, -7.9, 0.011
    coded = encode(weight, "mxfp4", group=32, dtype=torch.float32)
    assert coded.scales is not None and coded.tensor_scale is None
    assert coded.scales[0, :3].tolist() == [1.0, 1.0, 2.0**-9]
    assert coded.codes[0, [0, 32]].tolist() == [7, 15]


def test_nvfp4_scales_worked_by_hand() -> None:
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[0, 16], weight[1, 0] = 2688.0, 6.0, 1e-9  # 2688 = 448 * 6
    coded = encode(weight, "nvfp4", group=16, dtype=torch.bfloat16)
    assert coded.scales is not None and coded.tensor_scale is not None
    assert coded.tensor_scale.tolist() == [1.0]
    assert coded.scales.tolist() == [[448.0, 1.0], [2.0**-9, 2.0**-9]]
    assert coded.codes[0, [0, 16]].tolist() == [7, 7]
    assert coded.codes[1].sum() == 0


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1.0, 1e30])
def test_any_size_of_weights_gives_finite_numbers(
    name: str, size: float, rng: torch.Generator
) -> None:
    weight = torch.randn(4, 64, generator=rng) * size
    group = None if name == "fp8_e4m3_tensor" else FORMATS[name].group or 16
    coded = encode(weight, name, group=group, dtype=torch.float32)
    assert coded.scales is None or (coded.scales > 0).all()
    assert coded.tensor_scale is None or (coded.tensor_scale > 0).all()
    assert decode(coded.codes, FORMATS[name]).isfinite().all()
