"""Opens a device by its name: all that is known of it, the surest first."""

import platform
from dataclasses import dataclass
from pathlib import Path

from autoprune.errors import ProfileError
from autoprune.latency.devices import Datasheet, find_datasheet
from autoprune.latency.inside import inside_models
from autoprune.latency.paper import Carried, Chain, Paper
from autoprune.latency.predict import Predictor
from autoprune.latency.profiles import (
    HEADER,
    Profile,
    find_profile,
    profiles_that_ship,
)
from autoprune.latency.sources import Measured, Source

AUTO, CPU = "auto", "cpu"

NOT_MEASURED = "not measured on a GPU yet"
"""What stands wherever a figure of a GPU comes from a data sheet alone."""


@dataclass(frozen=True, eq=False)
class Device:
    """A device, ready to predict for.

    Attributes:
        name: As its driver or its data sheet calls it.
        predictor: Predicts times on it.
        basis: What the times come from, in one line for people.
        kind: ``cuda`` or ``cpu``.
        profile: Name of the profile of this very device; None without.
    """

    name: str
    predictor: Predictor
    basis: str
    kind: str = "cuda"
    profile: str | None = None


def open_device(name: str) -> Device:
    """Open a device.

    Args:
        name: ``auto`` for the machine's own GPU, or else its processor; ``cpu``; a GPU
            such as ``h100``; the folder of a profile, or the name of one that ships.

    Raises:
        ProfileError: If nothing is known of it.
    """
    if (Path(name) / HEADER).is_file() or name in profiles_that_ship():
        return _recorded(find_profile(name))
    if name == AUTO:
        name = _own_gpu() or CPU
    if name == CPU:
        return _processor()
    sheet = find_datasheet(name)
    own: list[tuple[Profile, Datasheet]] = []
    others: list[tuple[Profile, Datasheet]] = []
    for shipped in profiles_that_ship():
        profile = find_profile(shipped)
        if profile.kind == "cuda":
            origin = find_datasheet(str(profile.device["name"]))
            (own if origin == sheet else others).append((profile, origin))
    if own:
        return _recorded(own[-1][0])
    sources: list[Source] = [
        Carried(_measured(profile), origin, sheet)
        for profile, origin in _nearest(others, sheet)
    ]
    basis = f"the data sheet of {sheet.name}; {NOT_MEASURED}"
    if sources:
        basis = f"{others[-1][0].name}, carried over to {sheet.name}"
    return Device(sheet.name, Predictor(Chain([*sources, Paper(sheet)])), basis)


def _recorded(profile: Profile) -> Device:
    """Open a device by its own profile, with its data sheet for what that lacks."""
    sources: list[Source] = [_measured(profile)]
    if profile.kind == "cuda":
        sources.append(Paper(find_datasheet(str(profile.device["name"]))))
    name = str(profile.device["name"])
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
    for shipped in reversed(profiles_that_ship()):
        profile = find_profile(shipped)
        if profile.kind == CPU and profile.device["name"] == own:
            return _recorded(profile)
    raise ProfileError(
        f"no profile of the processor {own!r} ships, and there is no data sheet to go "
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
