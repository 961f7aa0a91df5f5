"""Variants survive the disk; damage is found, the cap holds, processes share it."""

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from autoprune.compression.masks import kept_by_pattern
from autoprune.compression.store import DEFAULT_CAP_GB, VariantStore, cap_bytes
from autoprune.compression.variant import Variant
from autoprune.errors import StoreError

KEY = "ab" + "0" * 14
LARGE = 10**9


def kinds(rng: torch.Generator) -> dict[str, Variant]:
    """Make a variant of every kind of storage."""
    dense = Variant.dense(torch.randn(4, 16, generator=rng).bfloat16())
    weight, codes = dense.weight, torch.randint(16, (4, 16), generator=rng).byte()
    scales = torch.rand(4, 2, generator=rng)
    zeros = torch.randint(16, (4, 2), generator=rng).byte()
    made = {"dense": dense, "float32": Variant.dense(weight.float())}
    scores = weight.float().abs()
    made["bitmap"] = dense.pruned(weight, scores > 0.5)
    made["empty"] = dense.pruned(weight, scores > 1e9)
    made["2:4"] = dense.pruned(weight, kept_by_pattern(scores, "2:4"), pattern="2:4")
    for name in ("dense", "bitmap", "empty", "2:4"):
        made[f"{name}-4bit"] = made[name].quantized(
            codes, scales, zeros, bits=4, group=8
        )
        made[f"{name}-3bit-symmetric"] = made[name].quantized(
            codes % 8, scales[:, :1], None, bits=3, group=None
        )
    return made


KINDS = list(kinds(torch.Generator().manual_seed(0)))


def same(one: Variant | None, other: Variant) -> bool:
    assert one is not None
    return one.storage == other.storage and torch.equal(one.weight, other.weight)


def file_of(store: VariantStore, key: str = KEY) -> Path:
    return store.folder / key[:2] / f"{key}.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> VariantStore:
    return VariantStore(tmp_path / "variants", LARGE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_comes_back(
    kind: str, store: VariantStore, rng: torch.Generator
) -> None:
    variant = kinds(rng)[kind]
    assert KEY not in store
    assert store.get(KEY) is None
    store.put(KEY, variant)
    assert KEY in store
    assert same(store.get(KEY), variant)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_exactly_the_declared_parts(
    kind: str, store: VariantStore, rng: torch.Generator
) -> None:
    variant = kinds(rng)[kind]
    store.put(KEY, variant, about="layer: action")
    with safe_open(file_of(store), framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["about"] == "layer: action"
    declared = variant.storage.parts
    assert {
        name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in found.items()
    } == {name: (f"torch.{part.dtype}", part.shape) for name, part in declared.items()}
    assert sum(tensor.nbytes for tensor in found.values()) == variant.storage.nbytes


def test_every_damaged_byte_is_found(
    store: VariantStore, rng: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    variant = kinds(rng)["2:4-4bit"]
    store.put(KEY, variant)
    path = file_of(store)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with caplog.at_level(logging.CRITICAL):
            found = store.get(KEY)
        if found is not None:  # a name of a type in other letters, or what it is about
            assert same(found, variant), f"byte {place} was not missed"
        else:
            assert not path.exists()


@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_a_truncated_file_counts_as_absent(
    left: int,
    store: VariantStore,
    rng: torch.Generator,
    caplog: pytest.LogCaptureFixture,
) -> None:
    variant = kinds(rng)["bitmap"]
    store.put(KEY, variant)
    path = file_of(store)
    path.write_bytes(path.read_bytes()[:left])
    assert store.get(KEY) is None
    assert f"{path} is damaged" in caplog.text
    assert KEY not in store
    store.put(KEY, variant)
    assert same(store.get(KEY), variant)


def test_a_file_of_another_format_is_made_again(
    store: VariantStore, rng: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, kinds(rng)["dense"])
    path = file_of(store)
    text = path.read_bytes().replace(b'"format":"2"', b'"format":"0"')
    path.write_bytes(text)
    assert store.get(KEY) is None
    assert "its format is 0" in caplog.text
    assert KEY not in store


def test_a_file_that_cannot_be_read_is_an_error(store: VariantStore) -> None:
    file_of(store).mkdir(parents=True)
    with pytest.raises(StoreError, match=rf"cannot read the variant .*{KEY}"):
        store.get(KEY)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="folder of variants .*file/variants: Not a d"):
        VariantStore(tmp_path / "file" / "variants", LARGE)


def test_what_was_used_longest_ago_goes_first(
    tmp_path: Path, rng: torch.Generator
) -> None:
    variant = kinds(rng)["dense"]
    store = VariantStore(tmp_path, LARGE)
    keys = [f"{index:02x}" + "0" * 14 for index in range(6)]
    for age, key in enumerate(keys):
        store.put(key, variant)
        os.utime(file_of(store, key), (10**9 + age, 10**9 + age))
    size = file_of(store, keys[0]).stat().st_size
    assert store.get(keys[0]) is not None  # used just now: the second goes first
    store.cap_bytes = 4 * size + 10
    assert store.shrink() == 3 * size  # a tenth of the cap is made free
    assert [key in store for key in keys] == [True, False, False, False, True, True]
    assert store.shrink() == 0


def test_the_cap_holds_while_variants_are_made(
    tmp_path: Path, rng: torch.Generator
) -> None:
    variant = kinds(rng)["dense"]
    VariantStore(tmp_path, LARGE).put(KEY, variant)
    size = file_of(VariantStore(tmp_path, LARGE)).stat().st_size
    store = VariantStore(tmp_path, int(3.5 * size))
    for index in range(8):
        store.put(f"{index:02x}" + "0" * 14, variant)
        assert sum(f.stat().st_size for f in tmp_path.glob("*/*")) <= store.cap_bytes
    assert "07" + "0" * 14 in store
    assert KEY not in store


def test_half_written_files_of_killed_processes_go(store: VariantStore) -> None:
    folder = store.folder / "ab"
    folder.mkdir()
    old, young = folder / "a.part", folder / "b.part"
    old.write_bytes(b"12345")
    young.write_bytes(b"123")
    yesterday = time.time() - 86400
    os.utime(old, (yesterday, yesterday))
    assert store.shrink() == 5
    assert not old.exists()
    assert young.exists()


FULL = """
import resource, sys, torch
from pathlib import Path
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.errors import StoreError

store = VariantStore(Path(sys.argv[1]), 10**9)
store.put("aa", Variant.dense(torch.zeros(4, 4)))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    store.put("bb", Variant.dense(torch.zeros(64, 64)))
except StoreError as error:
    print(error)
assert store.get("aa") is not None and store.get("bb") is None
"""


def test_a_file_that_the_disk_cannot_take_is_an_error(tmp_path: Path) -> None:
    """The kernel refuses the write, as it does on a full disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    message = r"cannot write a variant of 16\d+ bytes to .*bb\.safetensors: File too"
    assert re.match(message, done.stdout), done.stdout
    assert "set AUTOPRUNE_CACHE to a folder on another disk" in done.stdout
    left = [path.name for path in tmp_path.glob("*/*")]
    assert left == ["aa.safetensors"]  # nothing half written


WRITER = """
import sys, torch
from pathlib import Path
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant

store = VariantStore(Path(sys.argv[1]), int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for turn in range(150):
    key = f"{turn % 5:02x}" + "0" * 14
    variant = Variant.dense(torch.full((16, 16), float(turn % 5)))
    store.put(key, variant)
    found = store.get(key)
    assert found is None or torch.equal(found.weight, variant.weight), turn
"""


@pytest.mark.parametrize("cap", [LARGE, 4000], ids=["roomy", "shrinking"])
def test_two_processes_may_write_the_same_variants(cap: int, tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(cap)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for writer in writers:  # both start at once, whatever their imports take
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
        assert "damaged" not in errors
    store = VariantStore(tmp_path, cap)
    for number in range(5):
        found = store.get(f"{number:02x}" + "0" * 14)
        if cap == LARGE:
            assert same(found, Variant.dense(torch.full((16, 16), float(number))))
    assert not list(tmp_path.glob("*/*.part"))


@pytest.mark.parametrize(
    ("text", "expected"), [("", None), ("0.5", 5 * 10**8), ("3", 3 * 10**9)]
)
def test_the_cap_may_be_set(
    text: str, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AUTOPRUNE_STORE_GB", raising=False)
    if text:
        monkeypatch.setenv("AUTOPRUNE_STORE_GB", text)
    assert cap_bytes() == (expected or int(DEFAULT_CAP_GB * 1e9))


@pytest.mark.parametrize("text", ["0", "-1", "much", "nan", "inf", "20GB"])
def test_an_impossible_cap_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPRUNE_STORE_GB", text)
    with pytest.raises(StoreError, match=f"positive number .* found '{text}'"):
        cap_bytes()
