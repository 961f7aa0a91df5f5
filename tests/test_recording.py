"""Cells of benchmarks: written whole, read by name, measured once."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parents[1] / "results"


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load a script of a benchmark as if it were run in its folder."""
    monkeypatch.syspath_prepend(str(RESULTS))
    monkeypatch.syspath_prepend(str((RESULTS / path).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, RESULTS / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cell_is_stamped_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = script("recording.py", monkeypatch).Records(tmp_path / "cells")
    assert records.read() == {}
    records.write("gptq-4bit", {"kl": 0.5}, machine="x")
    records.write("rtn-4bit", {"kl": 1.5})
    found = records.read()
    date = found["gptq-4bit"].pop("date")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    assert found["gptq-4bit"] == {
        "cell": "gptq-4bit",
        "kl": 0.5,
        "torch": torch.__version__,
        "machine": "x",
    }
    assert list(found) == ["gptq-4bit", "rtn-4bit"]
    assert list(records.read("rtn-*")) == ["rtn-4bit"]
    assert {path.suffix for path in records.folder.iterdir()} == {".json"}


def test_what_is_there_or_not_asked_for_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = script("recording.py", monkeypatch).Records(tmp_path)
    assert records.lacks("rtn-4bit") and records.lacks("rtn-4bit", ["gptq", "rtn-*"])
    assert not records.lacks("rtn-4bit", ["gptq-*"])
    records.write("rtn-4bit", {"error": "MethodError: no"})
    assert records.lacks("rtn-4bit")
    records.write("rtn-4bit", {"kl": 1.5})
    assert not records.lacks("rtn-4bit") and not records.lacks("rtn-4bit", ["rtn-*"])


def test_what_cannot_be_written_leaves_the_cell_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = script("recording.py", monkeypatch).Records(tmp_path)
    records.write("one", {"kl": 1.5})
    with pytest.raises(TypeError):
        records.write("one", {"kl": object()})
    assert records.read()["one"]["kl"] == 1.5


@pytest.mark.parametrize("name", ["search/cells.py", "methods/records.py"])
def test_a_benchmark_keeps_its_cells_beside_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script(name, monkeypatch)
    assert module.RECORDS.folder == (RESULTS / name).parent / "cells"


def test_a_search_cell_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("search/cells.py", monkeypatch)
    monkeypatch.setattr(module.RECORDS, "folder", tmp_path)
    calls = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"kl": 0.5}

    for _ in range(2):
        module.run_cells({"ours-50": measure, "theirs-50": measure}, ["ours-*"])
    assert len(calls) == 1
    (path,) = tmp_path.iterdir()
    known = ["cell", "kl", "cell_cpu_s", "date", "torch", "machine"]
    assert list(json.loads(path.read_text())) == known
