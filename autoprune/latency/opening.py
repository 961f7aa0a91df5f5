"""Opens devices by what is known of them: recorded profiles, or data sheets."""

import platform
from collections.abc import Iterable
from pathlib import Path

from autoprune.errors import ProfileError
from autoprune.latency.device import Device, LatencyBackend
from autoprune.latency.devices import Datasheet, find_datasheet
from autoprune.latency.inside import inside_models
from autoprune.latency.paper import Carried, Chain, Paper
from autoprune.latency.predict import Predictor
from autoprune.latency.profiles import (
    HEADER,
    Profile,
    find_profile,
    known_profiles,
)
from autoprune.latency.sources import Measured, Source

AUTO, CPU = "auto", "cpu"

NOT_MEASURED = "not measured on a GPU yet"
"""What stands wherever a figure of a GPU comes from a data sheet alone."""


class Profiles(LatencyBackend):
    """Devices that were recorded: one of the known profiles, or the folder of one."""

    name = "profiles"
    rank = 10

    def open(self, device: str) -> Device | None:
        """Open a profile, a processor like this one, or a GPU that was recorded."""
        if (Path(device) / HEADER).is_file() or device in known_profiles():
            return _recorded(find_profile(device))
        if device == CPU:
            return _processor()
        sheet = _sheet_of(device)
        own = [
            profile
            for profile in _gpus()
            if device == (name := str(profile.device["name"]))
            or (sheet is not None and _sheet_of(name) == sheet)
        ]
        return _recorded(own[-1]) if own else None


class Datasheets(LatencyBackend):
    """GPUs that were not recorded: another one's profile carried over, or on paper."""

    name = "datasheets"
    rank = 20

    def open(self, device: str) -> Device | None:
        """Open a GPU by its short name.

        Raises:
            ProfileError: If nothing is known of it; lists near misses.
        """
        sheet = find_datasheet(device)
        pairs = [(one, _sheet_of(str(one.device["name"]))) for one in _gpus()]
        others = _nearest([(one, origin) for one, origin in pairs if origin], sheet)
        sources: list[Source] = [
            Carried(_measured(profile), origin, sheet) for profile, origin in others
        ]
        basis = f"the data sheet of {sheet.name}; {NOT_MEASURED}"
        if others:
            basis = f"{others[0][0].name}, carried over to {sheet.name}"
        predictor = Predictor(Chain([*sources, Paper(sheet)]))
        return Device(sheet.name, predictor, basis)


BUILT_IN = (Profiles(), Datasheets())


def open_device(name: str, backends: Iterable[LatencyBackend] = BUILT_IN) -> Device:
    """Open a device.

    Args:
        name: ``auto`` for the machine's own GPU, or else its processor; ``cpu``; a GPU
            such as ``h100``; the folder of a profile, or its name.
        backends: Who is asked.

    Raises:
        ProfileError: If nothing is known of it.
    """
    wanted = (_own_gpu() or CPU) if name == AUTO else name
    for backend in sorted(backends, key=lambda backend: backend.rank):
        device = backend.open(wanted)
        if device is not None:
            return device
    raise ProfileError(
        f"no latency backend knows the device {wanted!r}. `autoprune plugins` lists "
        "them"
    )


def _gpus() -> list[Profile]:
    """Read the known profiles of GPUs."""
    known = (find_profile(name) for name in known_profiles())
    return [profile for profile in known if profile.kind == "cuda"]


def _sheet_of(device: str) -> Datasheet | None:
    """Find the data sheet of a GPU; None of one that is not known on paper."""
    try:
        return find_datasheet(device)
    except ProfileError:
        return None


def _recorded(profile: Profile) -> Device:
    """Open a device by its own profile, with its data sheet for what that lacks."""
    sources: list[Source] = [_measured(profile)]
    name = str(profile.device["name"])
    if profile.kind == "cuda" and (sheet := _sheet_of(name)) is not None:
        sources.append(Paper(sheet))
    basis = f"{profile.name}, recorded {profile.created[:10]}"
    return Device(name, Predictor(Chain(sources)), basis, profile.kind, profile.name)


def _measured(profile: Profile) -> Measured:
    return Measured(profile, inside_models(profile))


def _nearest(
    others: list[tuple[Profile, Datasheet]], sheet: Datasheet
) -> list[tuple[Profile, Datasheet]]:
    """Sort profiles of other devices: the same generation first, then the newest."""
    newest = reversed(others)
    return sorted(newest, key=lambda pair: pair[1].capability != sheet.capability)


def _own_gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _processor() -> Device:
    """Open the profile of a processor like this one.

    Raises:
        ProfileError: If none was recorded.
    """
    own = processor_name()
    for shipped in reversed(known_profiles()):
        profile = find_profile(shipped)
        if profile.kind == CPU and profile.device["name"] == own:
            return _recorded(profile)
    raise ProfileError(
        f"the processor {own!r} was not recorded, and there is no data sheet to go "
        "by. Record one with `autoprune profile --device cpu` and name its folder"
    )


def processor_name() -> str:
    """Give the name of the processor, with the units that decide its speed."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    named = [
        li.partition(":")[2].strip() for li in text.splitlines() if "model name" in li
    ]
    return named[0] if named else platform.machine()
