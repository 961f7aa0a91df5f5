"""Sizes of safetensors files, to the byte, without writing one."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from autoprune_plugins.packed import Packed
from tiny_exports import tiny_case

from autoprune.compression.storage import ITEM_BYTES, Part, Storage
from autoprune.exporting.exporter import Digests, Exporter, ExportJob
from autoprune.exporting.weight_files import header_bytes, safetensors_bytes
from autoprune.policy import Layer

LAYER = Layer("blocks.0.proj", (6, 8), "bfloat16", 0, "proj", "blocks.0.proj")


def parts_of(tensors: dict[str, torch.Tensor]) -> dict[str, Part]:
    return {
        name: Part(str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"a": "é", "b": '"\n'}])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_size_is_the_files(count: int, metadata: dict[str, str]) -> None:
    dtypes = [getattr(torch, name) for name in ITEM_BYTES]
    tensors = {
        f"läyer.{index}.{'x' * (index % 5)}": torch.zeros(
            (index, 3)[: index % 3], dtype=dtypes[index % len(dtypes)]
        )
        for index in range(count)
    }
    written = len(safetensors.torch.save(tensors, metadata or None))
    assert safetensors_bytes(parts_of(tensors), metadata) == written


def test_the_order_in_the_file_decides_offsets_and_is_known() -> None:
    # Offsets of different lengths: another order would give another size.
    names = ["b", "a", "c", "B"]
    kinds = [torch.uint8, torch.float32, torch.bfloat16, torch.int64]
    for shift in range(4):
        tensors = {
            name: torch.zeros(10 ** (index + 1), dtype=kinds[(index + shift) % 4])
            for index, name in enumerate(names)
        }
        written = len(safetensors.torch.save(tensors))
        assert safetensors_bytes(parts_of(tensors), {}) == written


def test_a_header_share_is_never_too_small() -> None:
    small = {f"layer.{index}": Part("uint8", (5,)) for index in range(9)}
    base = safetensors_bytes(small, {})
    more = {**small, "another": Part("float32", (3, 4))}
    added = safetensors_bytes(more, {}) - base - more["another"].nbytes
    share = header_bytes("another", more["another"])
    assert added <= share <= added + 32


class Halved(Exporter):
    """A format of somebody else: values alone, in a file of its own kind."""

    name = "halved"
    stores = "values"
    loads_in = "nothing"

    def tensors(self, layer: Layer, storage: Storage) -> dict[str, Part]:
        return {layer.name: Part(storage.dtype, (storage.kept,))}

    def metadata(self) -> dict[str, str]:
        return {}

    def write(self, folder: Path, job: ExportJob) -> Digests:
        (folder / "one.safetensors").write_bytes(b"12345")
        (folder / "two.safetensors").write_bytes(b"123")
        (folder / "config.json").write_bytes(b"{}")
        return {}

    def load(self, folder: Path) -> Any:
        return None


def test_what_a_new_exporter_gets_for_nothing(tmp_path: Path) -> None:
    case = tiny_case("llama", tmp_path / "llama")
    exporter = Halved()
    storage = Storage.dense(LAYER).masked(24, "2:4")
    assert exporter.refuses(LAYER, storage) is None
    assert exporter.for_model(case.dense, case.job.inventory) is exporter
    part = Part("bfloat16", (24,))
    assert exporter.layer_bytes(LAYER, storage) == 48 + header_bytes(LAYER.name, part)
    whole = {LAYER.name: part, "norm": Part("float32", (6,))}
    untouched = {"norm": Part("float32", (6,))}
    assert exporter.size_bytes({LAYER: storage}, untouched) == safetensors_bytes(
        whole, {}
    )


def test_written_bytes_are_those_of_weight_files(tmp_path: Path) -> None:
    case = tiny_case("llama", tmp_path / "llama")
    made = tmp_path / "made"
    made.mkdir()
    Halved().write(made, case.job)
    assert Halved().written_bytes(made) == 8


def test_prices_add_up_to_little_more_than_the_size(tmp_path: Path) -> None:
    case, exporter = tiny_case("llama", tmp_path / "llama"), Packed()
    prices = {la: exporter.layer_bytes(la, s) for la, s in case.job.storages.items()}
    size = exporter.size_bytes(case.job.storages, case.untouched)
    bound = exporter.size_bytes({}, case.untouched) + sum(prices.values())
    tensors = sum(len(s.parts) for s in case.job.storages.values())
    assert size <= bound <= size + 16 * tensors
