"""Profiles on disk: what is written is read, and what is not right is refused."""

import json
from pathlib import Path

import pytest

from autoprune.errors import ProfileError
from autoprune.latency.profiles import (
    FIT,
    HEADER,
    HOLDOUT,
    POINTS,
    VALIDATION,
    Point,
    Profile,
    find_profile,
    split_of,
)


def a_profile(name: str = "mine") -> Profile:
    points = [
        Point(
            "gemm", "torch.mm.bf16", 12.5, us_min=12.0, us_p90=13.75, m=1, n=64, k=32
        ),
        Point("gemm", "cslt.24.bf16", 9.0, m=1, n=64, k=32, algorithm=7, split=HOLDOUT),
        Point("gemm", "torch.int_mm", 0.0, m=1, n=64, k=32, status="out of memory"),
        Point("model_decode", "tiny", 5.0, m=1, split=VALIDATION, note='{"a": 1}'),
    ]
    return Profile(
        name=name,
        device={"kind": "cuda", "name": "H200", "capability": [9, 0]},
        software={"torch": "2.11.0", "cusparselt": 801},
        method={"timer": "events"},
        created="2026-11-28T12:00:00+00:00",
        points=points,
        quality={"drift": 0.01},
        complete=False,
    )


def test_a_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    profile = a_profile()
    folder = profile.write(tmp_path)
    assert folder == tmp_path / "mine"
    found = Profile.read(folder)
    assert list(found.points) == list(profile.points)
    for name in ("name", "device", "software", "method", "created", "quality"):
        assert getattr(found, name) == getattr(profile, name)
    assert not found.complete
    assert found.kind == "cuda" and found.capability == (9, 0)
    assert not list(tmp_path.glob(".*"))  # nothing half written is left


def test_points_are_asked_for_by_operation_and_split() -> None:
    profile = a_profile()
    assert [p.kernel for p in profile.of("gemm")] == ["torch.mm.bf16", "cslt.24.bf16"]
    assert [p.kernel for p in profile.of("gemm", split=FIT)] == ["torch.mm.bf16"]
    assert len(profile.timed) == 3
    assert profile.points[0].spread == pytest.approx(0.1)
    assert profile.points[2].spread == 0.0


def test_a_profile_is_never_changed(tmp_path: Path) -> None:
    a_profile().write(tmp_path)
    with pytest.raises(ProfileError, match=r"mine exists\. A profile is never changed"):
        a_profile().write(tmp_path)


def edit(folder: Path, **changes: object) -> None:
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps(header | changes))


@pytest.mark.parametrize("schema", [2, "1", None])
def test_a_newer_schema_is_refused(tmp_path: Path, schema: object) -> None:
    folder = a_profile().write(tmp_path)
    edit(folder, schema=schema)
    with pytest.raises(ProfileError, match="reads up to 1. Update AutoPrune"):
        Profile.read(folder)


def test_fields_of_a_later_minor_version_are_passed_over(tmp_path: Path) -> None:
    folder = a_profile().write(tmp_path)
    edit(folder, weather="fine")
    assert Profile.read(folder).name == "mine"


def test_changed_points_are_refused(tmp_path: Path) -> None:
    folder = a_profile().write(tmp_path)
    other = a_profile("other").write(tmp_path)
    data = bytearray((other / POINTS).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / POINTS).write_bytes(bytes(data))
    with pytest.raises(ProfileError, match=r"is not what was recorded: its SHA-256"):
        Profile.read(folder)


@pytest.mark.parametrize("name", [HEADER, POINTS])
def test_a_missing_file_is_told(tmp_path: Path, name: str) -> None:
    folder = a_profile().write(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ProfileError, match=f"cannot read the profile .*{name}"):
        Profile.read(folder)


def test_a_header_that_is_none_is_told(tmp_path: Path) -> None:
    folder = a_profile().write(tmp_path)
    (folder / HEADER).write_text("{")
    with pytest.raises(ProfileError, match="cannot read the profile"):
        Profile.read(folder)
    (folder / HEADER).write_text('{"schema": 1}')
    with pytest.raises(ProfileError, match="points_sha256"):
        Profile.read(folder)


def test_profiles_are_found_by_folder_or_by_name(tmp_path: Path) -> None:
    folder = a_profile().write(tmp_path)
    assert find_profile(folder).name == "mine"
    assert find_profile(str(folder)).name == "mine"
    with pytest.raises(ProfileError, match="unknown profile 'h2000'"):
        find_profile("h2000")


def test_whole_shapes_are_held_out_and_always_the_same() -> None:
    splits = [split_of("torch.mm.bf16", n, k) for n in range(64) for k in range(64)]
    share = splits.count(HOLDOUT) / len(splits)
    assert set(splits) == {FIT, HOLDOUT}
    assert share == pytest.approx(0.2, abs=0.02)
    # SHA-256 of "a 1 2", "a 1 3", "a 1 4" begin with 84, 1 and 48: a fifth is 51.2.
    assert [split_of("a", 1, k) for k in (2, 3, 4)] == [FIT, HOLDOUT, HOLDOUT]
    assert split_of("torch.mm.bf16", 64, 32, share=1.0) == HOLDOUT
    assert split_of("torch.mm.bf16", 64, 32, share=0.0) == FIT
