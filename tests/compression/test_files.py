"""Files of tensors survive full disks, deleted folders, and one another's processes."""

import errno
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_disks import small_disk

from autoprune.compression import files as module
from autoprune.compression.files import ALIGNMENT, TensorFiles
from autoprune.errors import StoreError

KEY = "ab" + "0" * 14
PARTS = {"weight": torch.arange(12.0).view(3, 4), "codes": torch.arange(5).byte()}


@pytest.fixture
def files(tmp_path: Path) -> TensorFiles:
    return TensorFiles(tmp_path / "things", 10**9, what="thing")


@contextmanager
def process(code: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """Start Python; the code says a line when it is ready and reads one to go on."""
    started = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    yield started


def finish(started: "subprocess.Popen[str]") -> str:
    out, errors = started.communicate("go\n", timeout=60)
    assert started.returncode == 0, errors
    return out


def test_file_that_comes_and_goes_is_whole_or_absent(files: TensorFiles) -> None:
    """Also where it comes just after it was found absent."""
    files.write(KEY, PARTS)
    path, aside = files.path(KEY), files.path(KEY).with_suffix(".aside")
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            path.rename(aside)
            aside.rename(path)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        found = [files.read(KEY) is not None for _ in range(3000)]
    finally:
        ended.set()
        other.join()
    assert {True, False} == set(found)


def test_tensors_and_facts_come_back(files: TensorFiles) -> None:
    assert files.read(KEY) is None
    files.write(KEY, PARTS, facts="said", about="of a test")
    found = files.read(KEY)
    assert found is not None
    assert found.facts == "said"
    assert found.tensors.keys() == PARTS.keys()
    assert all(torch.equal(found.tensors[name], PARTS[name]) for name in PARTS)


@pytest.mark.parametrize("about", ["", "x", "a longer text" * 9])
def test_the_first_tensor_is_aligned_as_in_memory(
    about: str, files: TensorFiles
) -> None:
    files.write(KEY, PARTS, about=about)
    content = files.path(KEY).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % ALIGNMENT == 0
    assert content[start : start + 48] == PARTS["weight"].numpy().tobytes()
    with safe_open(files.path(KEY), framework="pt") as file:  # others can read it
        assert torch.equal(file.get_tensor("weight"), PARTS["weight"])


def test_a_mapped_file_takes_no_memory_of_its_own(files: TensorFiles) -> None:
    files.write(KEY, {"weight": torch.ones(4_000_000)})
    before = anonymous_bytes()
    found = files.read(KEY)
    assert found is not None and found.tensors["weight"].sum() == 4_000_000
    assert anonymous_bytes() - before < 2_000_000  # of 16 MB
    files.path(KEY).unlink()
    assert found.tensors["weight"].sum() == 4_000_000  # it outlives its file


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(x.split()[1]) for x in lines if x.startswith("Anonymous:"))


def test_what_is_written_to_a_mapped_tensor_does_not_reach_the_file(
    files: TensorFiles,
) -> None:
    files.write(KEY, PARTS)
    one, other = files.read(KEY), files.read(KEY)
    assert one is not None and other is not None
    one.tensors["weight"].zero_()
    assert torch.equal(other.tensors["weight"], PARTS["weight"])
    again = files.read(KEY)
    assert again is not None and torch.equal(again.tensors["weight"], PARTS["weight"])


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        files = TensorFiles(disk / "things", 10**9, what="thing")
        files.write(KEY, {"weight": torch.ones(100_000)})
        message = r"cannot write a thing of 8\d+ bytes to .*cd\.safetensors: No space"
        with pytest.raises(StoreError, match=message):
            files.write("cd", {"weight": torch.ones(200_000)})
        found = files.read(KEY)
        assert found is not None and found.tensors["weight"].sum() == 100_000
        assert [path.name for path in disk.rglob("*.*")] == [f"{KEY}.safetensors"]
        files.write("cd", {"weight": torch.ones(100_000)})  # this one has room
        assert "cd" in files
        del found


def test_a_deleted_folder_is_made_again(files: TensorFiles) -> None:
    files.write(KEY, PARTS)
    held = files.read(KEY)
    shutil.rmtree(files.folder)
    assert files.read(KEY) is None
    assert KEY not in files
    assert files.shrink() == 0
    shutil.rmtree(files.folder)
    files.write(KEY, PARTS)
    for found in (held, files.read(KEY)):
        assert found is not None
        assert torch.equal(found.tensors["weight"], PARTS["weight"])


def test_a_folder_that_is_deleted_again_and_again(files: TensorFiles) -> None:
    done = threading.Event()

    def delete() -> None:
        while not done.is_set():
            shutil.rmtree(files.folder, ignore_errors=True)
            time.sleep(0.002)

    deleting = threading.Thread(target=delete)
    deleting.start()
    try:
        written = 0
        for _ in range(200):
            try:
                files.write(KEY, PARTS)
                written += 1
            except StoreError as error:  # refused by name, and nothing else
                assert "cannot write a thing" in str(error)
            found = files.read(KEY)
            assert found is None or torch.equal(
                found.tensors["weight"], PARTS["weight"]
            )
    finally:
        done.set()
        deleting.join()
    assert written > 150
    files.write(KEY, PARTS)
    assert files.read(KEY) is not None


READER = """
import sys
from pathlib import Path
from autoprune.compression.files import TensorFiles

files = TensorFiles(Path(sys.argv[1]), 10**9, what="thing")
found = files.read(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(float(found.tensors["weight"].sum()), sys.argv[2] in files)
"""


def test_a_file_that_goes_stays_with_who_has_mapped_it(files: TensorFiles) -> None:
    files.write(KEY, {"weight": torch.ones(1_000_000)})
    with process(READER, files.folder, KEY) as reader:
        files.cap_bytes = 5_000_000
        time.sleep(0.01)
        files.write("cd", {"weight": torch.ones(1_000_000)})
        assert KEY not in files
        assert "cd" in files
        assert finish(reader) == "1000000.0 False\n"


MAKER = """
import sys, time
from pathlib import Path
import torch
from autoprune.compression.files import TensorFiles

files = TensorFiles(Path(sys.argv[1]), 10**9, what="thing")
print("ready", flush=True)
sys.stdin.readline()
with files.alone("ab"):
    if files.read("ab") is None:
        time.sleep(0.5)
        files.write("ab", {"weight": torch.ones(4)})
        print("made")
"""


def test_one_process_makes_what_two_want(files: TensorFiles) -> None:
    with process(MAKER, files.folder) as one, process(MAKER, files.folder) as other:
        for each in (one, other):
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        assert sorted([finish(one), finish(other)]) == ["", "made\n"]
    assert files.read("ab") is not None


def test_a_killed_maker_keeps_nobody_waiting(files: TensorFiles) -> None:
    code = MAKER.replace("time.sleep(0.5)", "print('in', flush=True); time.sleep(99)")
    with process(code, files.folder) as killed:
        assert killed.stdin is not None and killed.stdout is not None
        killed.stdin.write("go\n")
        killed.stdin.flush()
        assert killed.stdout.readline() == "in\n"
        killed.kill()
        killed.communicate()
    start = time.monotonic()
    with files.alone("ab"):
        assert files.read("ab") is None
    assert time.monotonic() - start < 5


def test_a_slow_maker_is_waited_for_no_longer_than_allowed(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.2)
    entered = []
    with files.alone("ab"), files.alone("ab"):
        entered.append(True)
    assert entered


def test_without_locks_nobody_is_kept_from_anything(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)  # as on some network file systems
    with files.alone("ab"):
        files.write("ab", PARTS)
    files.cap_bytes = 10
    assert files.shrink() > 0


def test_a_garbled_file_is_told_once_and_made_again(
    files: TensorFiles, caplog: pytest.LogCaptureFixture
) -> None:
    files.write(KEY, PARTS)
    path = files.path(KEY)
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert files.read(KEY) is None
        assert files.read(KEY) is None
    assert len(caplog.records) == 1
    message = f"thing file {path} is damaged (its checksum does not match)"
    assert message in caplog.text
