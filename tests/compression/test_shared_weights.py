"""Unpacked weights in files: one copy for all processes, and the same models."""

import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_disks import small_disk
from tiny_banks import Bench
from tiny_models import tiny
from torch import Tensor, nn

from autoprune.compression import memory as module
from autoprune.compression.files import TensorFiles
from autoprune.compression.memory import WeightMemory
from autoprune.models.biases import bias_of, with_bias
from autoprune.models.layers import read_weight
from autoprune.policy import Action

EARLY, ROUND = Action.parse("early(keep=8)"), Action.parse("round(bits=4)")


@pytest.fixture
def files(tmp_path: Path) -> TensorFiles:
    return TensorFiles(tmp_path / "weights", 10**9, what="weight")


def never() -> Tensor:
    raise AssertionError("it was unpacked again")


def test_a_second_process_unpacks_nothing(files: TensorFiles) -> None:
    weight = torch.arange(12.0).view(3, 4)
    first, second = WeightMemory(10**6, files), WeightMemory(10**6, files)
    made = first.get("ab", lambda: weight, torch.float32)
    found = second.get("ab", never, torch.float32)
    assert torch.equal(made, weight) and torch.equal(found, weight)
    assert second.get("ab", never, torch.float32) is found
    assert first.held_bytes == second.held_bytes == 48


@pytest.mark.parametrize(
    ("stored", "computed", "held"),
    [
        ("bfloat16", "float32", "float32"),
        ("float16", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float32"),  # rounding would change differences
        ("float16", "bfloat16", "float16"),
    ],
)
def test_a_weight_comes_as_it_is_computed_with_if_it_loses_nothing(
    stored: str, computed: str, held: str, files: TensorFiles
) -> None:
    weight = torch.linspace(-1, 1, 12).view(3, 4).to(getattr(torch, stored))
    memory = WeightMemory(10**6, files)
    found = memory.get("ab", lambda: weight, getattr(torch, computed))
    assert found.dtype == getattr(torch, held)
    assert torch.equal(found, weight.to(found.dtype))


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_comes_along(computed: torch.dtype, files: TensorFiles) -> None:
    weight, bias = torch.randn(3, 4).bfloat16(), torch.randn(3).bfloat16()
    for read in (lambda: with_bias(weight, bias), never):
        found = WeightMemory(10**6, files).get("ab", read, computed)
        brought = bias_of(found)
        assert torch.equal(found, weight.to(computed))
        assert brought is not None and brought.dtype == torch.bfloat16
        assert torch.equal(brought, bias)


def test_types_do_not_mix(files: TensorFiles) -> None:
    weight = torch.ones(3, 4).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        found = WeightMemory(10**6, files).get("ab", lambda: weight, dtype)
        assert found.dtype == dtype


def test_mappings_are_no_more_than_allowed(
    files: TensorFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_MAPPED", 2)
    memory = WeightMemory(10**6, files)
    for key in ("aa", "bb", "cc"):
        memory.get(key, lambda: torch.ones(3, 4))
    assert memory.held_bytes == 2 * 48
    assert torch.equal(memory.get("aa", never), torch.ones(3, 4))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_model_with_shared_weights_computes_the_same_bits(
    kind: str, tmp_path: Path
) -> None:
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    outputs = []
    for name in ("own", "shared", "shared"):  # the second one reads all from files
        bench = Bench(tiny(kind), tmp_path / name / "variants")
        if name == "shared":
            bench.store.share_weights()
        bank = bench.bank()
        for policy in ([EARLY, ROUND], [ROUND, EARLY], [EARLY, ROUND]):
            pairs = enumerate(bench.layers)
            bank.put({layer: policy[i % 2] for i, layer in pairs})
            outputs.append(bench.model(ids).logits)
        bench.stitched.restore()
        outputs.append(bench.model(ids).logits)
    for index in range(4):
        assert torch.equal(outputs[index], outputs[4 + index])
        assert torch.equal(outputs[index], outputs[8 + index])
    made = list((tmp_path / "shared" / "weights").glob("*/*"))
    assert len(made) == 2 * len(bench.layers)


def test_a_layer_is_its_file(tiny_model: nn.Module, tmp_path: Path) -> None:
    """Nothing is copied on the way: the model computes with the mapped file."""
    bench = Bench(tiny_model, tmp_path / "variants")
    bench.store.share_weights()
    bank, layer = bench.bank(), bench.layers[0]
    bank.put({layer: EARLY})
    mapped = bank.weight(layer, EARLY)
    assert read_weight(bench.model, layer).data_ptr() == mapped.data_ptr()
    lines = Path("/proc/self/maps").read_text().splitlines()
    address = mapped.data_ptr()
    (line,) = (
        line
        for line in lines
        if int(line.split("-")[0], 16)
        <= address
        < int(line.split()[0].split("-")[1], 16)
    )
    assert line.endswith(".safetensors")


def test_a_full_disk_is_survived(
    tiny_model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 2**17) as disk:
        bench = Bench(tiny_model, disk / "variants")
        bench.store.share_weights()
        bank, expected = bench.bank(), {}
        for layer in bench.layers:
            expected[layer] = bank.get(layer, EARLY).weight
        with caplog.at_level(logging.WARNING):
            bank.put(dict.fromkeys(bench.layers, EARLY))
        for layer, weight in expected.items():
            assert torch.equal(read_weight(bench.model, layer), weight)
        message = "cannot write a weight of .* No space left on device.* held in memory"
        assert len(caplog.records) == 1  # told once
        assert re.search(message, caplog.text)
        bench.stitched.restore()
        del bank, bench


@pytest.mark.parametrize("damage", ["truncated", "garbled"])
def test_a_damaged_weight_is_made_again(
    damage: str, files: TensorFiles, caplog: pytest.LogCaptureFixture
) -> None:
    weight = torch.arange(12.0).view(3, 4)
    WeightMemory(10**6, files).get("ab", lambda: weight)
    path = files.path("ab")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-9] if damage == "truncated" else content[:-1] + b"x")
    again = WeightMemory(10**6, files).get("ab", lambda: weight)
    assert torch.equal(again, weight)
    assert f"weight file {path} is damaged" in caplog.text
    assert torch.equal(WeightMemory(10**6, files).get("ab", never), weight)


def test_a_cache_that_is_deleted_meanwhile(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    bench = Bench(tiny_model, tmp_path / "cache" / "variants")
    bench.store.share_weights()
    bank, ids = bench.bank(), torch.arange(3, 15)[None]
    early, turn = dict.fromkeys(bench.layers, EARLY), dict.fromkeys(bench.layers, ROUND)
    bank.put(early)
    before = bench.model(ids).logits
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(bench.model(ids).logits, before)  # mapped files live on
    bank.put(turn)  # all of it is made and written again
    bank.put(early)
    assert torch.equal(bench.model(ids).logits, before)


def test_a_small_cap_evicts_files_and_changes_no_weight(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    bench = Bench(tiny_model, tmp_path / "variants")
    folder = tmp_path / "weights"
    files = TensorFiles(folder, 40_000, what="weight")  # some two weights
    bench.store.memory = WeightMemory(10**9, files)
    bank = bench.bank()
    bank.put(dict.fromkeys(bench.layers, EARLY))
    for layer in bench.layers:
        assert torch.equal(
            read_weight(bench.model, layer), bank.get(layer, EARLY).weight
        )
    assert sum(path.stat().st_size for path in folder.glob("*/*")) <= 40_000


WORKER = """
import sys, hashlib
from pathlib import Path
import torch
from tiny_banks import Bench
from tiny_models import tiny
from autoprune.policy import Action

bench = Bench(tiny("llama"), Path(sys.argv[1]) / "variants")
bench.store.share_weights()
print("ready", flush=True)
sys.stdin.readline()
bank = bench.bank()
for text in ("early(keep=8)", "norm(keep=8)", "round(bits=4)") * 2:
    bank.put(dict.fromkeys(bench.layers, Action.parse(text)))
    logits = bench.model(torch.arange(3, 15)[None]).logits
    print(hashlib.sha256(logits.detach().numpy().tobytes()).hexdigest())
"""


def test_two_processes_make_and_map_the_same_at_once(tmp_path: Path) -> None:
    here = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {here!r})" + WORKER
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
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
        assert "damaged" not in errors
        outputs.append(out.split())
    assert outputs[0] == outputs[1]
    assert outputs[0][:3] == outputs[0][3:]
    assert len(set(outputs[0])) == 3
    assert not list(tmp_path.rglob("*.part"))


def test_what_unpacking_leaves_free_is_given_back_at_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(module, "give_back_free_memory", lambda: calls.append(True))
    monkeypatch.setattr(module, "_GIVE_BACK_BYTES", 100)
    memory = WeightMemory(10**6)
    for key in ("aa", "bb", "cc", "aa", "dd", "ee"):  # 48 bytes each; "aa" is held
        memory.get(key, lambda: torch.ones(3, 4))
        calls.append(False)
    assert calls == [False, False, True, False, False, False, False]
