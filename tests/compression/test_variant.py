import pytest
import torch

from autoprune.compression.masks import kept_by_pattern, kept_by_sparsity
from autoprune.compression.variant import Variant, pack_bits, unpack_bits

SHAPES = [(2, 4), (3, 16), (8, 32), (5, 48)]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
def test_packing_can_be_undone(bits: int, count: int, rng: torch.Generator) -> None:
    numbers = torch.randint(2**bits, (count,), generator=rng).byte()
    packed = pack_bits(numbers, bits)
    assert len(packed) == (count * bits + 7) // 8
    assert torch.equal(unpack_bits(packed, bits, count), numbers)


def test_the_least_significant_bit_comes_first() -> None:
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [33, 3]
    assert pack_bits(torch.tensor([5, 1], dtype=torch.uint8), 3).tolist() == [13]


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
