"""Whole models on their way into a journal and a profile."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from latency.tiny_recordings import TINY, CountingTimer, tiny_order

from autoprune.latency import record as recording_command
from autoprune.latency import recording
from autoprune.latency.inside import inside_models
from autoprune.latency.journal import Journal, key_of
from autoprune.latency.kernels import KERNELS
from autoprune.latency.model_recording import ModelRecorder
from autoprune.latency.profiles import FIT, Point, Profile
from autoprune.latency.record import record
from autoprune.latency.recording import Deadline
from autoprune.latency.running import generator_on
from autoprune.latency.whole_models import (
    Step,
    Variation,
    model_plan,
    planned,
    shape_of,
    variations,
)

VARIATIONS = variations(TINY, "cpu")
DECODE, PREFILL = Step("model_decode", 2, 12), Step("model_prefill", 2, 8)


def test_models_are_recorded_side_by_side(tmp_path: Path) -> None:
    order = tiny_order(tmp_path, part="models", probe=False)
    journal = Journal(tmp_path / "a.work", {}, resume=False)
    plan = [
        planned("tiny", one, step)
        for one in VARIATIONS[:3]
        for step in (DECODE, PREFILL)
    ]
    said: list[str] = []
    recorder = ModelRecorder("cpu", journal, tell=said.append, rounds=3, batch_ms=0.5)
    assert recorder.run(plan, Deadline.after(60))
    assert len(journal.points) == len(plan) and len(said) == 3
    for point in plan:
        found = journal.points[key_of(point)]
        note = json.loads(found.note)
        assert found.ok and found.us > 0 and note["rounds"] >= 3
        assert note["interval"][0] <= note["ratio"] <= note["interval"][1]
        assert shape_of(found) == shape_of(point)
        if found.kernel == "tiny dense":
            assert note["ratio"] == 1.0
    again = ModelRecorder("cpu", journal, tell=said.append, rounds=3)
    assert again.run(plan, Deadline.after(60)) and len(said) == 3
    assert order.model_points()[0].kernel == "tiny dense"


def test_the_missing_part_of_a_comparison_is_taken_against_dense_again(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "a.work", {}, resume=False)
    plan = [planned("tiny", one, DECODE) for one in VARIATIONS[:2]]
    journal.add(replace(plan[0], us=5.0))
    recorder = ModelRecorder("cpu", journal, rounds=3, batch_ms=0.5)
    assert recorder.run(plan, Deadline.after(60))
    assert journal.points[key_of(plan[0])].us == 5.0  # as it was
    assert journal.points[key_of(plan[1])].ok


def test_a_model_that_cannot_be_built_becomes_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "a.work", {}, resume=False)
    sparse = replace(TINY, name="2:4-mlp", mlp="2:4")
    plan = [planned("tiny", one, DECODE) for one in (TINY, sparse)]
    recorder = ModelRecorder("cpu", journal, rounds=3, batch_ms=0.5)
    assert recorder.run(plan, Deadline.after(60))
    assert journal.points[key_of(plan[0])].ok
    assert "no kernel multiplies 2:4" in journal.points[key_of(plan[1])].status


def test_the_algorithm_of_the_nearest_product_is_used(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.work", {}, resume=False)
    recorder = ModelRecorder("cpu", journal)
    kernel = KERNELS["cslt.24.bf16"]
    assert recorder._best_algorithm(kernel, 64, 64, 1) == 0
    for m, number in ((1, 5), (64, 7)):
        point = Point("gemm", kernel.name, 1.0, m=m, n=64, k=64, algorithm=number)
        journal.add(point)
    assert recorder._best_algorithm(kernel, 64, 128, 2) == 5
    assert recorder._best_algorithm(kernel, 64, 128, 512) == 7


def test_a_whole_recording_ends_in_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "cache_bytes", lambda _: 20e3)
    quick = partial(ModelRecorder, rounds=3, batch_ms=0.5)
    monkeypatch.setattr(recording_command, "ModelRecorder", quick)
    order = tiny_order(tmp_path, probe=False, seconds=8.0)
    record(order, timer=CountingTimer())
    record(replace(order, part="models", resume=True, seconds=60.0))
    found = record(replace(order, part="finish"))
    assert found.profile is not None
    profile = Profile.read(found.profile)
    for op in ("model_decode", "model_prefill"):
        names = {point.kernel for point in profile.of(op)}
        assert names == {f"tiny {one.name}" for one in VARIATIONS}
    assert len(profile.of("model_prefill", split=FIT)) == 3
    assert inside_models(profile) is not None


@pytest.mark.gpu
def test_models_are_captured_on_a_gpu(tmp_path: Path) -> None:
    small = Variation("dense", 512, 1024, 8, 2, 64, 1024, 2)
    journal = Journal(tmp_path / "a.work", {}, resume=False)
    plan = model_plan("cuda", {"small": small})
    ModelRecorder("cuda", journal).run(plan, Deadline.after(300))
    for point in plan:
        found = journal.points[key_of(point)]
        assert found.ok or "cannot run here" in found.status, found.status


@pytest.mark.gpu
def test_generators_of_a_gpu() -> None:
    assert generator_on("cuda").device.type == "cuda"
