"""Weight files are safetensors' own to the byte, and no tensor is held for them."""

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from autoprune.compression.storage import ITEM_BYTES, Part
from autoprune.errors import ExportError
from autoprune.exporting.weight_files import weight_file_bytes, write_weight_files

META = {"format": "pt"}


def numbers(dtype: str, *shape: int) -> Tensor:
    whole = torch.arange(-3, torch.Size(shape).numel() - 3).view(shape)
    return whole.to(getattr(torch, dtype))


def parts_of(tensors: dict[str, Tensor]) -> dict[str, Part]:
    return {
        name: Part(str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("metadata", [{}, META], ids=["none", "format"])
def test_a_file_is_the_one_that_safetensors_writes(
    metadata: dict[str, str], tmp_path: Path
) -> None:
    tensors = {f"lä{i}.{d}": numbers(d, 3, i) for i, d in enumerate(ITEM_BYTES)}
    tensors |= {"single": numbers("float32"), "last.odd": numbers("uint8", 5)}
    tensors["turned"] = numbers("bfloat16", 4, 6).T
    files = write_weight_files(
        tmp_path, parts_of(tensors), reversed(tensors.items()), metadata=metadata
    )
    assert files == [tmp_path / "model.safetensors"]
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert files[0].read_bytes() == safetensors.torch.save(plain, metadata or None)
    size = weight_file_bytes(parts_of(tensors), metadata)
    assert files[0].stat().st_size == size
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_files_have_an_index(tmp_path: Path) -> None:
    tensors = {f"t{index}": numbers("int16", 10) for index in range(5)}
    parts = parts_of(tensors)
    files = write_weight_files(
        tmp_path, parts, tensors.items(), metadata=META, stem="w", limit=40
    )
    names = [f"w-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
    assert [file.name for file in files] == names
    index = json.loads((tmp_path / "w.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 100}
    homes = dict(zip(tensors, [names[i] for i in (0, 0, 1, 1, 2)], strict=True))
    assert index["weight_map"] == homes
    for file in files:
        for name, found in safetensors.torch.load_file(file).items():
            assert homes.pop(name) == file.name
            assert torch.equal(found, tensors[name])
    assert not homes
    sizes = sum(file.stat().st_size for file in files)
    assert sizes == weight_file_bytes(parts, META, limit=40)


def test_no_tensor_is_held_until_its_file_is_complete(tmp_path: Path) -> None:
    parts = {f"t{index}": Part("float32", (8,)) for index in range(4)}
    alive: list[weakref.ref[Tensor]] = []

    def given() -> Iterator[tuple[str, Tensor]]:
        for name in parts:
            gc.collect()
            held = sum(one() is not None for one in alive)
            assert not held, f"{held} tensors are held when {name} is asked for"
            tensor = torch.zeros(8)
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    write_weight_files(tmp_path, parts, given(), metadata=META)
    assert len(alive) == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], r"never came: \['b'\]"),
        (["a", "c"], r"'c' is Part\(.*'float32'.*\), but None was declared"),
        (["a", "a"], r"'a' is Part\(.*\), but None was declared"),
    ],
    ids=["absent", "unknown", "twice"],
)
def test_what_was_not_declared_is_refused(
    names: list[str], message: str, tmp_path: Path
) -> None:
    parts = {name: Part("float32", (2,)) for name in "ab"}
    given = [(name, torch.zeros(2)) for name in names]
    with pytest.raises(ExportError, match=message):
        write_weight_files(tmp_path, parts, given, metadata=META)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3), torch.zeros(2).bfloat16()], ids=["shape", "type"]
)
def test_another_type_or_shape_is_refused(tensor: Tensor, tmp_path: Path) -> None:
    parts = {"a": Part("float32", (2,))}
    message = r"'a' is Part\(.*\), but Part\(dtype='float32', shape=\(2,\)\) was"
    with pytest.raises(ExportError, match=message):
        write_weight_files(tmp_path, parts, [("a", tensor)], metadata=META)
