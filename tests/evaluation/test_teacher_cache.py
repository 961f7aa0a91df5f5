"""A teacher from disk measures as the one that was made, and outlives what disks do."""

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_disks import small_disk
from tiny_models import tiny
from tiny_teachers import CASES, MASK, disturb, make, task_of, windows
from torch import nn

from autoprune.compression.store import VariantStore
from autoprune.errors import StoreError
from autoprune.evaluation.quality import Quality
from autoprune.evaluation.teacher import Teacher
from autoprune.evaluation.teacher_cache import Remembered, TeacherCache
from autoprune.models.text import TokenWindows


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return TeacherCache(tmp_path / "teachers", 10**9, "r1")


def teach(
    model: nn.Module,
    cache: TeacherCache | None,
    *,
    kind: str = "llama",
    text: TokenWindows | None = None,
    tokenizer: Any = MASK,
    batch: int = 2,
) -> Teacher:
    return Teacher(
        task_of(kind),
        model,
        text or windows(),
        tokenizer=tokenizer,
        batch=batch,
        cache=cache,
    )


def files_of(cache: TeacherCache) -> list[Path]:
    return sorted(cache.files.folder.glob("*/*"))


def same(one: Quality, other: Quality) -> bool:
    return torch.equal(one.kl, other.kl) and torch.equal(one.nll, other.nll)


def refuse_to_run(model: nn.Module) -> Callable[[], None]:
    """Let a model run on one window at most, as the check of its head does."""

    def refuse(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        ids = given["input_ids"] if "input_ids" in given else args[0]
        assert ids.shape[0] == 1, "the dense model was run again"

    return model.register_forward_pre_hook(refuse, with_kwargs=True).remove


@pytest.mark.parametrize("embedding", [False, True], ids=["layers", "embedding"])
@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_measurements_are_the_same_to_the_last_bit(
    kind: str, settings: dict[str, float], embedding: bool, cache: TeacherCache
) -> None:
    found: list[Any] = []
    for where in (None, cache, cache):  # without, made and written, read
        model = make(kind, settings)
        allow = refuse_to_run(model) if len(found) == 2 else lambda: None
        teacher = teach(model, where, kind=kind)
        allow()
        dense = teacher.dense
        disturb(model, embedding=embedding)
        whole, part = teacher.measure(model), teacher.measure(model, [4, 1])
        with torch.no_grad():
            features = teacher.task.features(model, teacher.batch_of([3, 1]))
        pull, of_head = teacher.pull(model, features, [3, 1], head=True)
        found.append((dense, whole, part, pull, of_head))
    assert len(files_of(cache)) == 1
    for other in found[1:]:
        assert all(same(*pair) for pair in zip(found[0][:3], other[:3], strict=True))
        assert torch.equal(found[0][3], other[3])
        assert torch.equal(found[0][4], other[4])


def test_bfloat16_is_kept_as_it_is(cache: TeacherCache) -> None:
    qualities = []
    for where in (None, cache, cache):
        model = tiny("llama").to(torch.bfloat16)
        teacher = teach(model, where)
        disturb(model)
        qualities.append(teacher.measure(model))
    assert all(same(qualities[0], other) for other in qualities[1:])


def test_what_a_teacher_depends_on_is_its_key(cache: TeacherCache) -> None:
    def key(**changes: Any) -> str:
        how = {
            "kind": "bert",
            "text": windows(),
            "tokenizer": MASK,
            "dtype": torch.float32,
            "batch": 2,
            "revision": "r1",
        } | changes
        task = task_of(how["kind"])
        whole = task.batch(how["text"].ids, how["tokenizer"])
        opened = TeacherCache(cache.files.folder, 10**9, how["revision"])
        return opened.key(task, whole, dtype=how["dtype"], batch=how["batch"])

    keys = [
        key(),
        key(kind="llama"),
        key(text=windows(4)),
        key(text=windows(5, 23)),
        key(tokenizer=SimpleNamespace(mask_token_id=2)),
        key(dtype=torch.bfloat16),
        key(batch=3),
        key(revision="r2"),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        keys.append(key())
    finally:
        torch.set_num_threads(threads)
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_teacher_that_is_read_takes_no_memory_of_its_own(
    cache: TeacherCache,
) -> None:
    teach(tiny("llama"), cache)
    teacher = teach(tiny("llama"), cache)
    mapped = mappings()
    for name in ("features", "expected", "cross", "log_sum"):
        address = getattr(teacher._dense, name).data_ptr()
        assert any(low <= address < high for low, high in mapped), name
    for means in teacher._heads[0].expected.values():
        assert any(low <= means.data_ptr() < high for low, high in mapped)


def mappings() -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if "/teachers/" in line]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


@pytest.mark.parametrize("damage", ["truncated", "garbled", "emptied"])
def test_a_damaged_file_is_made_again(
    damage: str, cache: TeacherCache, caplog: pytest.LogCaptureFixture
) -> None:
    expected = teach(tiny("llama"), cache).dense
    (path,) = files_of(cache)
    content = path.read_bytes()
    broken = {
        "truncated": content[:-100],
        "garbled": content[:-100] + bytes(100),
        "emptied": b"",
    }
    path.unlink()  # whoever has mapped the sound one keeps that
    path.write_bytes(broken[damage])
    with caplog.at_level(logging.WARNING):
        teacher = teach(tiny("llama"), cache)
    assert re.search(f"teacher file {path} is damaged .* making it again", caplog.text)
    assert same(teacher.dense, expected)
    assert path.read_bytes()[-1000:] == content[-1000:]  # it is there again, as it was


def test_a_full_disk_is_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = teach(tiny("llama"), None)
    with small_disk(tmp_path / "disk", 2**14) as disk, caplog.at_level(logging.WARNING):
        cache = TeacherCache(disk / "teachers", 10**9, "r1")
        teacher = teach(tiny("llama"), cache)
        message = (
            r"cannot write a teacher of \d+ bytes .* No space left .* holds its own"
        )
        assert re.search(message, caplog.text)
        assert not [path for path in disk.rglob("*") if path.suffix == ".part"]
    model = tiny("llama")
    disturb(model)
    assert same(teacher.measure(model), expected.measure(model))


def test_a_file_that_cannot_be_read_is_survived(
    cache: TeacherCache, caplog: pytest.LogCaptureFixture
) -> None:
    expected = teach(tiny("llama"), cache).dense
    (path,) = files_of(cache)
    path.unlink()
    path.mkdir()
    assert same(teach(tiny("llama"), cache).dense, expected)
    assert f"cannot read the teacher {path}" in caplog.text


def test_a_deleted_cache_is_survived(cache: TeacherCache) -> None:
    teacher, model = teach(tiny("llama"), cache), tiny("llama")
    disturb(model)
    before = teacher.measure(model)
    shutil.rmtree(cache.files.folder)
    assert same(teacher.measure(model), before)
    again = teach(tiny("llama"), cache)
    assert len(files_of(cache)) == 1
    assert same(again.measure(model), before)


def test_a_teacher_above_the_cap_is_not_kept(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "teachers", 1000, "r1")
    expected = teach(tiny("llama"), None).dense
    for _ in range(2):
        assert same(teach(tiny("llama"), cache).dense, expected)
        assert files_of(cache) == []


def test_the_cap_is_a_share_of_that_of_variants(tmp_path: Path) -> None:
    cache = TeacherCache.beside(VariantStore(tmp_path / "variants", 10**9), "r1")
    assert cache.files.cap_bytes == 10**8
    assert cache.files.folder == tmp_path / "teachers"


def test_what_goes_wrong_while_it_is_made_is_told_as_it_is(
    cache: TeacherCache,
) -> None:
    def fail() -> Remembered:
        raise MemoryError("too large")

    with pytest.raises(MemoryError, match="too large"):
        cache.get("ab", fail)
    with cache.files.alone("ab"):  # nobody is kept waiting
        assert files_of(cache) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="folder of teachers .*file/teachers: Not a d"):
        TeacherCache(tmp_path / "file" / "teachers", 10**9, "r1")


WORKER = """
import sys
from pathlib import Path
from tiny_models import tiny
from tiny_teachers import task_of, windows
from autoprune.evaluation.teacher import Teacher
from autoprune.evaluation.teacher_cache import TeacherCache

model, runs = tiny("llama"), []
model.register_forward_pre_hook(lambda *_: runs.append(1))
cache = TeacherCache(Path(sys.argv[1]), 10**9, "r1")
print("ready", flush=True)
sys.stdin.readline()
teacher = Teacher(task_of("llama"), model, windows(), tokenizer=None, cache=cache)
print(len(runs), teacher.dense.nll.double().sum().item())
"""


def test_one_of_two_processes_makes_it_for_both(tmp_path: Path) -> None:
    here = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {here!r})" + WORKER
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "teachers")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    outputs = []
    for worker in workers:
        out, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
        outputs.append(out.split())
    runs, losses = zip(*outputs, strict=True)
    assert losses[0] == losses[1]
    few, many = sorted(map(int, runs))
    assert many > few > 0  # of the check of the head alone
