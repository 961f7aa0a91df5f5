"""Blocks of GGUF: bytes worked out by hand, and what gguf's reader makes of them."""

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import dequantize
from torch import Tensor

from autoprune.compression.grids import fit_grid, nearest_codes
from autoprune.compression.masks import kept_by_pattern
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.targets.gguf_blocks import blocks, is_rounded, kind_of, values

ROWS, COLUMNS = torch.arange(6), torch.arange(128)


def random_weight(dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Rows of several sizes, some all above zero and some below."""
    weight = torch.randn(6, 128, generator=rng) * torch.logspace(-3, 1, 6)[:, None]
    weight[0], weight[1] = weight[0].abs() + 0.001, -weight[1].abs() - 0.01
    return weight.to(dtype)


def quantized(
    weight: Tensor,
    *,
    bits: int,
    group: int | None = 32,
    symmetric: bool = True,
    masked: bool = False,
) -> Variant:
    variant = Variant.dense(weight)
    if masked:
        kept = kept_by_pattern(weight.abs().float(), "2:4")
        variant = variant.pruned(weight, kept, pattern="2:4")
    full = variant.weight.float()
    scales, zeros = fit_grid(
        full, bits=bits, group=group, symmetric=symmetric, dtype=weight.dtype
    )
    codes = nearest_codes(full, scales, zeros, bits=bits)
    stored = None if symmetric else zeros.to(torch.uint8)
    return variant.quantized(codes, scales, stored, bits=bits, group=group)


def one_block(codes: list[int], scale: float, zero: int | None, bits: int) -> Variant:
    """One row of one block in bfloat16."""
    dense = Variant.dense(torch.zeros(1, 32, dtype=torch.bfloat16))
    zeros = None if zero is None else torch.tensor([[zero]], dtype=torch.uint8)
    scales = torch.tensor([[scale]], dtype=torch.bfloat16)
    rows = torch.tensor([codes], dtype=torch.uint8)
    return dense.quantized(rows, scales, zeros, bits=bits, group=32)


def written(variant: Variant) -> list[int]:
    found = blocks(variant, torch.arange(1), torch.arange(32)).data
    return [int(byte) for byte in found.flatten()]


HALF = [0x00, 0x38]  # 0.5 in float16: 0x3800, its low byte first


def test_four_bits_by_hand() -> None:
    codes = list(range(16)) + list(reversed(range(16)))
    # The first 16 codes lie low in their bytes, the last 16 high.
    nibbles = [code | ((15 - code) << 4) for code in range(16)]
    assert written(one_block(codes, 0.5, None, bits=4)) == HALF + nibbles


def test_three_bits_are_moved_up_by_hand() -> None:
    # Three bits mean zero at 4, blocks of four bits at 8.
    assert written(one_block([0, 7] * 16, 0.5, None, bits=3)) == HALF + [
        *[4 | 4 << 4, 11 | 11 << 4] * 8
    ]


def test_five_bits_by_hand() -> None:
    codes = [16] + [0] * 30 + [31]
    fifth = [0x01, 0, 0, 0x80]
    low = [0] * 15 + [0xF0]
    assert written(one_block(codes, 0.5, None, bits=5)) == HALF + fifth + low


def test_eight_bits_by_hand() -> None:
    codes = [0, 128, 255] + [128] * 29
    assert written(one_block(codes, 0.5, None, bits=8)) == HALF + [0x80, 0, 127] + (
        [0] * 29
    )


def test_a_minimum_forwards_by_hand() -> None:
    # minus 3 times 0.5 is -1.5: 0xBE00
    assert written(one_block([3] * 32, 0.5, 3, bits=4)) == HALF + [0, 0xBE] + (
        [0x33] * 16
    )


def test_a_minimum_backwards_by_hand() -> None:
    # A step of -0.5 (0xB800) from (15 - 12) * 0.5 = 1.5 (0x3E00): code 12 is 3 then.
    assert written(one_block([12] * 32, 0.5, 12, bits=4)) == [0, 0xB8, 0, 0x3E] + (
        [0x33] * 16
    )


def test_mxfp4_by_hand() -> None:
    dense = Variant.dense(torch.zeros(1, 32, dtype=torch.bfloat16))
    codes = torch.tensor([[2] * 16 + [15] * 16], dtype=torch.uint8)
    scales = torch.tensor([[0.25]])
    variant = dense.quantized(codes, scales, None, bits=4, group=32, code="mxfp4")
    assert written(variant) == [125] + [0xF2] * 16  # 2^(125 - 127); codes 1 and -6
    told = blocks(variant, torch.arange(1), torch.arange(32)).told
    assert told.tolist() == [[0.25] * 16 + [-1.5] * 16]


EXACT = [
    *((dtype, bits, True) for dtype in ("bfloat16", "float16") for bits in range(2, 9)),
    *((dtype, bits, False) for dtype in ("bfloat16", "float16") for bits in (2, 3, 6)),
    ("bfloat16", 4, False),
    ("float16", 7, False),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize(("dtype", "bits", "symmetric"), EXACT)
def test_what_gguf_reads_is_the_weight_to_the_bit(
    dtype: str,
    bits: int,
    symmetric: bool,
    group: int | None,
    masked: bool,
    rng: torch.Generator,
) -> None:
    weight = random_weight(getattr(torch, dtype), rng)
    variant = quantized(
        weight, bits=bits, group=group, symmetric=symmetric, masked=masked
    )
    made = blocks(variant, ROWS, COLUMNS)
    read = torch.from_numpy(dequantize(made.data, made.kind))
    assert torch.equal(read, made.told)
    assert torch.equal(read.to(weight.dtype), variant.weight)
    assert not is_rounded(variant.storage)
    assert made.kind is kind_of(variant.storage)


@pytest.mark.parametrize(
    ("dtype", "bits", "kind"),
    [
        ("bfloat16", 5, Kind.Q5_1),
        ("float16", 4, Kind.Q4_1),
        ("float16", 5, Kind.Q5_1),
        ("float32", 4, Kind.Q4_1),
    ],
)
def test_rounded_minima_are_told_and_bounded(
    dtype: str, bits: int, kind: Kind, rng: torch.Generator
) -> None:
    weight = random_weight(getattr(torch, dtype), rng)
    variant = quantized(weight, bits=bits, symmetric=False)
    made = blocks(variant, ROWS, COLUMNS)
    assert (made.kind, is_rounded(variant.storage)) == (kind, True)
    read = torch.from_numpy(dequantize(made.data, made.kind))
    assert torch.equal(read, made.told)
    assert variant.scales is not None and variant.zeros is not None
    steps = variant.scales.float().repeat_interleave(32, 1)
    zeros = variant.zeros.float().repeat_interleave(32, 1)
    assert variant.codes is not None
    exact = (variant.codes.double() - zeros) * steps
    off = (read - exact).abs() / steps
    assert 0 < off.max() < 0.01 * (2 if dtype == "float32" else 1)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_removed_weights_stay_zeros(bits: int, rng: torch.Generator) -> None:
    weight = random_weight(torch.float16, rng)
    variant = quantized(weight, bits=bits, symmetric=False, masked=True)
    made = blocks(variant, ROWS, COLUMNS)
    assert made.kind in (Kind.Q5_0, Kind.Q8_0)
    assert variant.mask is not None
    assert not dequantize(made.data, made.kind)[~variant.mask.numpy()].any()


@pytest.mark.parametrize("group", [None, 64])
def test_rows_and_columns_that_stay(group: int | None, rng: torch.Generator) -> None:
    variant = quantized(random_weight(torch.bfloat16, rng), bits=4, group=group)
    rows = torch.tensor([4, 1, 3])
    columns = torch.cat([torch.arange(32, 64), torch.arange(96, 128)])
    made = blocks(variant, rows, columns)
    wanted = variant.weight[rows][:, columns]
    assert torch.equal(made.told.to(torch.bfloat16), wanted)
    assert made.data.shape == (3, 2 * 18)


def test_single_columns_may_go_with_a_scale_a_row(rng: torch.Generator) -> None:
    variant = quantized(random_weight(torch.bfloat16, rng), bits=8, group=None)
    columns = torch.arange(128)[torch.arange(128) % 4 > 0]
    made = blocks(variant, ROWS, columns)
    assert torch.equal(made.told.to(torch.bfloat16), variant.weight[:, columns])


def test_small_scales_lose_no_more_than_said() -> None:
    scale = 1.5 * 2.0**-20  # of 24 bits below one, float16 keeps four here
    variant = one_block([0, 255] * 16, scale * (1 + 2**-7), None, bits=8)
    told = blocks(variant, torch.arange(1), torch.arange(32)).told
    off = (told - variant.base.float()).abs().max()
    assert 0 < off <= 128 * 2.0**-25


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 32), (7,)])
def test_values_are_read_to_the_bit(
    dtype: str, shape: tuple[int, ...], rng: torch.Generator
) -> None:
    tensor = torch.randn(shape, generator=rng).to(getattr(torch, dtype))
    kind = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16}[dtype]
    made = values(tensor, kind)
    read = dequantize(made.data, kind).astype(np.float32)
    assert torch.equal(torch.from_numpy(read), tensor.float())
    assert torch.equal(made.told, tensor)


def storage(bits: int, **changes: Any) -> Storage:
    plain: dict[str, Any] = {"group": 32, "symmetric": True, "code": "int"} | changes
    mask = plain.pop("mask", None)
    return Storage((8, 64), "bfloat16", 256 if mask else 512, mask, bits, **plain)


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        (storage(2), Kind.Q4_0),
        (storage(4), Kind.Q4_0),
        (storage(5), Kind.Q5_0),
        (storage(6), Kind.Q8_0),
        (storage(8), Kind.Q8_0),
        (storage(3, symmetric=False), Kind.Q4_0),
        (storage(4, symmetric=False), Kind.Q4_1),
        (storage(5, symmetric=False), Kind.Q5_1),
        (storage(7, symmetric=False), Kind.Q8_0),
        (storage(8, symmetric=False), None),
        (storage(4, symmetric=False, mask="2:4"), Kind.Q5_0),
        (storage(5, symmetric=False, mask="bitmap"), Kind.Q8_0),
        (storage(3, code="int_float_zero"), Kind.Q4_1),
        (storage(5, code="int_float_zero"), Kind.Q5_1),
        (storage(6, code="int_float_zero"), None),
        (storage(4, code="int_float_zero", mask="2:4"), None),
        (storage(8, code="int_tensor"), Kind.Q8_0),
        (storage(4, code="mxfp4"), Kind.MXFP4),
        (storage(4, code="nf4"), None),
        (storage(4, code="nvfp4", group=16), None),
        (storage(8, code="fp8_e4m3"), None),
    ],
)
def test_which_type_holds_what(stored: Storage, kind: Kind | None) -> None:
    assert kind_of(stored) is kind
