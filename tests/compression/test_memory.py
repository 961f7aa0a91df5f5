"""Weights in memory are those of the files, and no more than fit."""

from pathlib import Path

import torch
from torch import Tensor, nn
from toy_methods import toys

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.memory import MEMORY_SHARE, WeightMemory, memory_bytes
from autoprune.compression.store import VariantStore
from autoprune.models.layers import inventory
from autoprune.models.text import TokenWindows
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Action


class Reads:
    """Reads weights of 100 bytes, and counts."""

    def __init__(self, memory: WeightMemory) -> None:
        self.memory = memory
        self.keys: list[str] = []

    def read(self, key: str, size: int = 25) -> Tensor:
        self.keys.append(key)
        return torch.full((size,), float(ord(key)))

    def get(self, keys: str, size: int = 25) -> list[float]:
        got = [self.memory.get(key, lambda k=key: self.read(k, size)) for key in keys]
        return [float(weight[0]) for weight in got]


def test_held_weight_is_not_read_again() -> None:
    reads = Reads(WeightMemory(300))
    assert reads.get("abcabc") == [97, 98, 99] * 2
    assert reads.keys == ["a", "b", "c"]
    first = reads.memory.get("a", lambda: torch.zeros(1))
    assert first is reads.memory.get("a", lambda: torch.zeros(1))


def test_longest_unused_goes_first() -> None:
    reads = Reads(WeightMemory(300))
    reads.get("abc")
    reads.get("a")  # so b is the one used longest ago
    reads.get("d")
    assert reads.memory.held_bytes == 300
    reads.keys.clear()
    reads.get("acd")
    assert reads.keys == []
    reads.get("b")
    assert reads.keys == ["b"]
    reads.get("a")  # went for b
    assert reads.keys == ["b", "a"]


def test_cap_is_kept_to_the_byte() -> None:
    reads = Reads(WeightMemory(299))
    for key in "abcdeab":
        reads.get(key)
        assert reads.memory.held_bytes <= 200
    reads.get("x", size=74)  # 296 bytes: all others have to go
    assert reads.memory.held_bytes == 296


def test_weight_above_the_cap_is_given_but_not_held() -> None:
    reads = Reads(WeightMemory(99))
    assert reads.get("aa") == [97, 97]
    assert reads.keys == ["a", "a"]
    assert reads.memory.held_bytes == 0


def test_cap_is_a_share_of_the_machine() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) for line in lines if "MemTotal" in line)
    assert memory_bytes() == int(MEMORY_SHARE * total * 1024)


def make_bank(model: nn.Module, folder: Path) -> VariantBank:
    found = inventory(model, list(load_plugins().objects["architectures"].values()))
    ids = torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(0))
    return VariantBank(
        StitchedModel(model, found.layers),
        found,
        Actions(toys()),
        VariantStore(folder, 10**9),
        TokenWindows(ids, "statistics", "test", "0" * 16),
        "r1",
    )


def test_weight_of_a_bank_is_that_of_its_variant(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    bank = make_bank(tiny_model, tmp_path)
    layers = [layer for layer in bank.inventory.layers if layer.block is not None]
    actions = [Action.parse(text) for text in ("early(keep=8)", "round(bits=4)")]
    for action in (DENSE, *actions):
        for layer in layers:
            weight = bank.weight(layer, action)
            assert torch.equal(weight, bank.get(layer, action).weight)
            assert (bank.weight(layer, action) is weight) or action is DENSE
    assert bank.store.memory.held_bytes == 2 * 4 * sum(
        layer.shape[0] * layer.shape[1] for layer in layers
    )


def test_bank_without_memory_gives_the_same_weights(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    bank = make_bank(tiny_model, tmp_path)
    layer = bank.inventory.layers[1]
    action = Action.parse("early(keep=8)")
    held = bank.weight(layer, action).clone()
    bank.store.memory.cap_bytes = 0
    bank.weight(bank.inventory.layers[2], action)  # drives all others out
    assert bank.store.memory.held_bytes == 0
    assert torch.equal(bank.weight(layer, action), held)
