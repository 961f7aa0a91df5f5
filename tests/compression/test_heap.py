"""What is free on the heap goes back to the system, and a pass holds little at once."""

import ctypes
import os
import platform
import re
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from torch import nn
from toy_methods import Columns

from autoprune.compression import heap
from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.heap import give_back_free_memory
from autoprune.compression.method import Settings, Source
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.models.layers import inventory
from autoprune.models.statistics import InputStatistics
from autoprune.models.text import TokenWindows
from autoprune.policy import Action

MB = 2**20

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ,
    reason="needs glibc as it is by itself",
)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The C library is looked at again, before and after."""
    heap._trimmer.cache_clear()
    yield
    heap._trimmer.cache_clear()


def own_bytes() -> int:
    """Tell what memory this process has of its own; Linux only."""
    text = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def leave_on_the_heap(megabytes: int) -> list[torch.Tensor]:
    """Free tensors that glibc keeps; what is given must be held, or it may not."""
    torch.ones(31 * MB, dtype=torch.uint8)  # freed: smaller ones now use the heap
    freed = [torch.ones(4 * MB, dtype=torch.uint8) for _ in range(megabytes // 4)]
    end = max(tensor.data_ptr() for tensor in freed)
    pins = [torch.empty(64_000)]
    while pins[-1].data_ptr() < end:  # it fitted into an old hole
        pins.append(torch.empty(64_000))
    return pins  # the last lies behind what is freed, and bars the heap's end


@needs_glibc
def test_free_memory_inside_of_the_heap_is_given_back() -> None:
    give_back_free_memory()
    before = own_bytes()
    pins = leave_on_the_heap(128)
    kept = own_bytes() - before
    assert give_back_free_memory()
    assert own_bytes() - before < 16 * MB
    assert kept > 100 * MB  # else nothing was to be given back
    assert pins


@needs_glibc
def test_little_work_leaves_the_heap_as_it_is() -> None:
    assert not give_back_free_memory(after=heap.WORTH_BYTES - 1)
    assert give_back_free_memory(after=heap.WORTH_BYTES)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("error", [OSError, TypeError], ids=["no file", "Windows"])
def test_without_a_c_library_nothing_happens(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str | None) -> object:
        raise error("no such library")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert not give_back_free_memory()


@pytest.mark.usefixtures("forgotten")
def test_with_another_c_library_nothing_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not give_back_free_memory()


def bank_of(model: nn.Module, methods: Sequence[Columns], folder: Path) -> VariantBank:
    found = inventory(model, register_architectures())
    ids = torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(0))
    return VariantBank(
        StitchedModel(model, found.layers),
        found,
        Actions({method.name: method for method in methods}),
        VariantStore(folder, 10**9),
        TokenWindows(ids, "statistics", "test", "0" * 16),
        "r1",
    )


class Wasteful(Columns):
    """Leaves 32 MB on the heap with every call."""

    def __init__(self) -> None:
        super().__init__("norm", frozenset({"input_norm"}))
        self.pins: list[list[torch.Tensor]] = []

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        self.pins.append(leave_on_the_heap(32))
        return super().compress(sources, statistics, settings)


@needs_glibc
def test_what_a_block_leaves_is_given_back_before_the_next(
    tiny_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heap, "WORTH_BYTES", 0)  # its blocks are tiny
    method, action = Wasteful(), Action.parse("norm(keep=8)")
    bank = bank_of(tiny_model, [method], tmp_path)
    layers = [layer for layer in bank.inventory.layers if layer.block is not None]
    taken: list[int] = []
    bank.make(
        [(layer, action) for layer in layers],
        lambda done, total: taken.append(own_bytes()),
    )
    assert len(taken) == 3 and len(method.pins) == 8
    assert max(taken) - taken[0] < 16 * MB


class Counting(Columns):
    """Counts the masks of its own and of others that are held when it is called."""

    def __init__(
        self, name: str, seen: list[weakref.ref[torch.Tensor]], held: list[int]
    ) -> None:
        super().__init__(name, frozenset({"hessian"}))
        self.seen, self.held = seen, held

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        self.held.append(sum(mask() is not None for mask in self.seen))
        made = super().compress(sources, statistics, settings)
        for variant in (variant for variants in made for variant in variants):
            assert variant.mask is not None
            self.seen.append(weakref.ref(variant.mask))
        return made


def test_what_a_method_gave_is_let_go_before_the_next_is_called(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []
    methods = [Counting(name, seen, held) for name in ("one", "two", "three")]
    bank = bank_of(tiny_model, methods, tmp_path)
    layers = [layer for layer in bank.inventory.layers if layer.block is not None]
    texts = [f"{name}(keep={n})" for name in ("one", "two", "three") for n in (4, 8)]
    bank.make([(layer, Action.parse(text)) for layer in layers for text in texts])
    assert len(seen) == len(layers) * len(texts)
    assert held == [0] * (3 * 2 * 4)  # methods, blocks, inputs of a block
