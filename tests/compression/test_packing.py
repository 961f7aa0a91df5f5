import pytest
import torch

from autoprune.compression.packing import pack_bits, unpack_bits


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
