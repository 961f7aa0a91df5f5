import pytest
import torch

from autoprune.compression.masks import (
    kept_by_pattern,
    kept_by_sparsity,
    kept_by_tiles,
)
from autoprune.compression.variant import Variant

SHAPES = [(2, 4), (3, 16), (8, 32), (5, 48)]


def dense(shape: tuple[int, int], rng: torch.Generator) -> Variant:
    return Variant.dense(torch.randn(shape, generator=rng).bfloat16())


def quantized(
    variant: Variant, bits: int, *, symmetric: bool, rng: torch.Generator
) -> Variant:
    shape = variant.storage.shape
    codes = torch.randint(2**bits, shape, generator=rng).byte()
    zeros = torch.randint(2**bits, (shape[0], 2), generator=rng).byte()
    return variant.quantized(
        codes,
        torch.rand(shape[0], 2, generator=rng),
        None if symmetric else zeros,
        bits=bits,
        group=shape[1] // 2,
    )


def same(first: Variant, second: Variant) -> bool:
    return torch.equal(first.weight, second.weight) and first.storage == second.storage


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_dense_variant_is_its_weight(
    shape: tuple[int, int], rng: torch.Generator
) -> None:
    variant = dense(shape, rng)
    assert torch.equal(variant.weight, variant.pack()["values"])
    assert same(Variant.unpack(variant.storage, variant.pack()), variant)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", [None, "1:4", "2:4", "3:4", "1:2"])
@pytest.mark.parametrize("bits", [None, *range(2, 9)])
def test_variants_survive_packing(
    shape: tuple[int, int], pattern: str | None, bits: int | None, rng: torch.Generator
) -> None:
    variant = dense(shape, rng)
    scores = variant.weight.float().abs()
    kept = (
        kept_by_pattern(scores, pattern)
        if pattern
        else kept_by_sparsity(scores, 0.3, per="layer")
    )
    variant = variant.pruned(variant.weight, kept, pattern=pattern)
    if bits is not None:
        variant = quantized(variant, bits, symmetric=bits % 2 == 0, rng=rng)
    packed = variant.pack()
    assert same(Variant.unpack(variant.storage, packed), variant)
    assert sum(part.nbytes for part in packed.values()) == variant.storage.nbytes
    assert not variant.weight[~kept].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_quantized_variants_survive_packing(
    shape: tuple[int, int], bits: int, symmetric: bool, rng: torch.Generator
) -> None:
    variant = quantized(dense(shape, rng), bits, symmetric=symmetric, rng=rng)
    assert same(Variant.unpack(variant.storage, variant.pack()), variant)


def test_a_weight_is_code_less_zero_times_scale() -> None:
    variant = Variant.dense(torch.zeros(1, 4)).quantized(
        torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8),
        torch.tensor([[0.5, 2.0]]),
        torch.tensor([[1, 2]], dtype=torch.uint8),
        bits=2,
        group=2,
    )
    assert variant.weight.tolist() == [[-0.5, 1.0, -2.0, 0.0]]


def test_without_zero_points_zero_is_in_the_middle() -> None:
    variant = Variant.dense(torch.zeros(1, 4)).quantized(
        torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8),
        torch.tensor([[0.5]]),
        None,
        bits=2,
        group=None,
    )
    assert variant.weight.tolist() == [[-1.0, -0.5, 0.0, 0.5]]


def test_a_layer_may_lose_every_weight() -> None:
    variant = Variant.dense(torch.ones(2, 4))
    variant = variant.pruned(variant.weight, torch.zeros(2, 4, dtype=torch.bool))
    assert variant.storage.kept == 0
    assert same(Variant.unpack(variant.storage, variant.pack()), variant)


def test_pruned_weights_are_positive_zeros() -> None:
    kept = torch.tensor([[True, False, True, False]])
    variant = Variant.dense(-torch.ones(1, 4))
    variant = variant.pruned(variant.weight, kept, pattern="2:4")
    assert variant.weight.tolist() == [[-1.0, 0.0, -1.0, 0.0]]
    assert not variant.weight[~kept].signbit().any()


@pytest.mark.parametrize(
    "tile", [(1, 8), (1, 48), (12, 1), (4, 4), (6, 16), (12, 48)], ids=str
)
@pytest.mark.parametrize("bits", [None, 3, 4])
def test_tiled_variants_survive_packing(
    tile: tuple[int, int], bits: int | None, rng: torch.Generator
) -> None:
    variant = dense((12, 48), rng)
    scores = torch.rand(12 // tile[0], 48 // tile[1], generator=rng)
    kept = kept_by_tiles(scores, 0.4, tile, per="layer")
    variant = variant.pruned(variant.weight, kept, pattern=f"{tile[0]}x{tile[1]}")
    if bits is not None:
        variant = quantized(variant, bits, symmetric=bits == 4, rng=rng)
    packed = variant.pack()
    assert len(packed["mask"]) == (scores.numel() + 7) // 8
    assert sum(part.nbytes for part in packed.values()) == variant.storage.nbytes
    again = Variant.unpack(variant.storage, packed)
    assert same(again, variant)
    assert again.mask is not None and torch.equal(again.mask, kept)


def test_the_bits_of_tiles_stand_row_by_row_the_first_lowest() -> None:
    # Tiles of 2x2, kept: 1 0 / 0 1 / 1 1, so the bits are 1 + 8 + 16 + 32.
    flags = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    kept = flags.repeat_interleave(2, 0).repeat_interleave(2, 1)
    variant = Variant.dense(torch.ones(6, 4))
    variant = variant.pruned(variant.weight, kept, pattern="2x2")
    assert variant.pack()["mask"].tolist() == [57]
    assert variant.storage.kept == 16


def test_other_masks_are_packed_as_ever(rng: torch.Generator) -> None:
    kept = torch.rand(5, 16, generator=rng) < 0.5
    variant = Variant.dense(torch.ones(5, 16)).pruned(torch.ones(5, 16), kept)
    weights = 2 ** torch.arange(8)
    expected = (kept.view(-1, 8) * weights).sum(1)
    assert variant.pack()["mask"].tolist() == expected.tolist()
