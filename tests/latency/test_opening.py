"""Who opens a device, and by what."""

from pathlib import Path

import pytest
from latency.synthetic import points, profile

from autoprune.errors import ProfileError
from autoprune.latency.device import Device, LatencyBackend
from autoprune.latency.devices import DATASHEETS
from autoprune.latency.estimate import Tier
from autoprune.latency.opening import BUILT_IN, open_device
from autoprune.latency.paper import Paper
from autoprune.latency.predict import Predictor
from autoprune.latency.profiles import profiles_that_ship
from autoprune.latency.shape import Linear
from autoprune.plugins import load_plugins

LINEAR = Linear("x", 4096, 4096)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with the profile of an H200 that never was."""
    made = profile(points("torch.mm.bf16"))
    monkeypatch.setenv("AUTOPRUNE_PROFILES", str(tmp_path))
    return made.write(tmp_path)


def tier(device: Device) -> Tier:
    return device.predictor.linear(LINEAR, 64, "bfloat16").tier


def test_a_profile_is_opened_by_folder_by_name_and_by_its_device(
    recorded: Path,
) -> None:
    for name in (str(recorded), "synthetic", "h200", "NVIDIA H200"):
        device = open_device(name)
        assert (device.profile, device.kind) == ("synthetic", "cuda")
        assert tier(device) is Tier.TABLE_EXACT


def test_what_a_profile_lacks_comes_from_the_data_sheet(recorded: Path) -> None:
    term = open_device("h200").predictor.linear(
        Linear("x", 4096, 4096, "fp8-row"), 64, "bfloat16"
    )
    assert term.tier is Tier.ROOFLINE_DATASHEET


def test_another_device_is_told_by_the_profile_of_the_nearest(recorded: Path) -> None:
    device = open_device("a100")
    assert device.profile is None
    assert device.basis == "synthetic, carried over to a100"
    assert tier(device) is Tier.TABLE_TRANSFERRED


def test_a_recorded_device_needs_no_data_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPRUNE_PROFILES", str(tmp_path))
    made = profile(points("torch.mm.bf16"), name="NVIDIA T4", capability=[7, 5])
    folder = made.write(tmp_path)
    for name in (str(folder), "synthetic", "NVIDIA T4"):
        assert tier(open_device(name)) is Tier.TABLE_EXACT
    # It stands in nobody's way: what cannot be scaled is not carried over.
    assert tier(open_device("a100")) is Tier.ROOFLINE_DATASHEET


def test_without_any_profile_the_data_sheet_is_left() -> None:
    device = open_device("rtx 4090")
    assert tier(device) is Tier.ROOFLINE_DATASHEET
    assert "not measured on a GPU yet" in device.basis


def test_the_machine_itself_is_opened_by_auto() -> None:
    """Where its processor was recorded; else the message says what to do."""
    try:
        device = open_device("auto")
    except ProfileError as error:
        assert "`autoprune profile --device cpu`" in str(error)
    else:
        assert device.profile in profiles_that_ship()


class Farm(LatencyBackend):
    """Knows one device, that nobody else knows."""

    name = "farm"

    def open(self, device: str) -> Device | None:
        if device != "farm-1":
            return None
        predictor = Predictor(Paper(DATASHEETS["h100"]))
        return Device("farm-1", predictor, "our own tables")


def test_a_backend_of_somebody_elses_is_asked_first() -> None:
    backends = [*BUILT_IN, Farm()]
    assert open_device("farm-1", backends).basis == "our own tables"
    assert open_device("h100", backends).name == "h100"
    with pytest.raises(ProfileError, match="nothing is known of the device 'farm-2'"):
        open_device("farm-2", backends)
    with pytest.raises(ProfileError, match="no latency backend knows .* 'farm-2'"):
        open_device("farm-2", [Farm()])


def test_the_built_in_ones_are_plugins() -> None:
    found = load_plugins().objects["latency_backends"]
    assert set(found) == {"profiles", "datasheets"}
