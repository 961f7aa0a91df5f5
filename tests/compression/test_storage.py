import pytest

from autoprune.compression.storage import BITMAP, Part, Storage, packed_bytes
from autoprune.policy import Layer

LAYER = Layer("layers.0.q", (8, 32), "bfloat16", block=0, role="q", input="x")
DENSE = Storage.dense(LAYER)


def test_dense_is_two_bytes_a_weight_in_bfloat16() -> None:
    assert DENSE.parts == {"values": Part("bfloat16", (8, 32))}
    assert (DENSE.nbytes, DENSE.sparsity, DENSE.groups) == (512, 0.0, 0)


def test_a_bitmap_costs_one_bit_a_weight() -> None:
    storage = DENSE.masked(128, BITMAP)
    assert storage.nbytes == 128 * 2 + 256 // 8
    assert storage.sparsity == 0.5


@pytest.mark.parametrize(
    ("pattern", "bits", "mask_bytes"),
    [("2:4", 2, 32), ("1:4", 2, 16), ("4:8", 0, 32), ("1:8", 3, 12), ("3:4", 0, 32)],
)
def test_patterns_store_positions_where_that_is_no_larger(
    pattern: str, bits: int, mask_bytes: int
) -> None:
    keep, of = (int(number) for number in pattern.split(":"))
    storage = DENSE.masked(256 // of * keep, pattern)
    assert storage.index_bits == bits
    assert storage.parts["mask"].nbytes == mask_bytes


def test_quantization_counts_codes_scales_and_zero_points() -> None:
    storage = DENSE.quantized(4, 16, symmetric=False)
    sizes = {name: part.nbytes for name, part in storage.parts.items()}
    assert sizes == {"codes": 128, "scales": 8 * 2 * 2, "zeros": 8}
    assert "zeros" not in DENSE.quantized(4, 16, symmetric=True).parts
    assert DENSE.quantized(4, None, symmetric=True).parts["scales"].shape == (8, 1)


def test_only_kept_weights_have_codes() -> None:
    storage = DENSE.masked(128, "2:4").quantized(3, None, symmetric=True)
    sizes = {name: part.nbytes for name, part in storage.parts.items()}
    assert sizes == {"codes": 48, "scales": 16, "mask": 32}


@pytest.mark.parametrize(
    ("count", "bits", "size"), [(0, 3, 0), (1, 2, 1), (3, 3, 2), (8, 5, 5), (5, 8, 5)]
)
def test_packing_leaves_no_gaps(count: int, bits: int, size: int) -> None:
    assert packed_bytes(count, bits) == size


@pytest.mark.parametrize(
    ("mask", "tile", "mask_bytes"),
    [
        ("1x8", (1, 8), 4),
        ("4x4", (4, 4), 2),
        ("1x32", (1, 32), 1),  # rows
        ("8x1", (8, 1), 4),  # columns
        ("1x1", (1, 1), 32),
    ],
)
def test_tiles_store_one_bit_each(
    mask: str, tile: tuple[int, int], mask_bytes: int
) -> None:
    storage = DENSE.masked(128, mask)
    assert (storage.tile, storage.index_bits) == (tile, 0)
    assert storage.nbytes == 128 * 2 + mask_bytes
    assert storage.parts["mask"] == Part("uint8", (mask_bytes,))


@pytest.mark.parametrize("mask", [None, BITMAP, "2:4", "4:8"])
def test_other_masks_have_no_tiles(mask: str | None) -> None:
    storage = DENSE if mask is None else DENSE.masked(128, mask)
    assert storage.tile == (1, 1)


def test_tiles_have_to_fill_the_matrix() -> None:
    with pytest.raises(AssertionError, match=r"3x4 do not fill \(8, 32\)"):
        _ = DENSE.masked(128, "3x4").tile
