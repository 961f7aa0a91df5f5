"""One recording from the command to the profile: which parts, how long, what for."""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from autoprune.errors import ProfileError
from autoprune.latency.facts import device_facts, software_facts
from autoprune.latency.journal import FILE, Journal, key_of
from autoprune.latency.model_recording import ModelRecorder
from autoprune.latency.pacing import seconds_of
from autoprune.latency.plan import kernel_plan, probe_plan
from autoprune.latency.profiles import Point, Profile
from autoprune.latency.quality import quality_of
from autoprune.latency.recording import (
    REPEAT_SHARE,
    Deadline,
    Recorder,
    Tell,
    about,
    tell_state,
)
from autoprune.latency.running import CACHES_CPU, CACHES_CUDA, CUDA_BYTES
from autoprune.latency.timing import Timer, one_thread, timer_for
from autoprune.latency.whole_models import Variation, model_plan

KINDS = ("cuda", "cpu")

WORK = ".work"
"""Ending of the folder that holds a recording's journal."""

KERNELS_PART, MODELS_PART, FINISH_PART, ALL_PARTS = "kernels", "models", "finish", "all"
PARTS = (ALL_PARTS, KERNELS_PART, MODELS_PART, FINISH_PART)

PROBE_S = 60.0
"""How long a probe takes at most."""

MODELS_SHARE = {"cuda": 0.3, "cpu": 0.4}
"""Share of the time that is kept for whole models."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be recorded.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        folder: Where profiles and working folders lie.
        name: Of the profile; by default device, torch and date.
        seconds: Stop after so many.
        part: ``all``; ``kernels`` or ``models`` alone, into the journal; or ``finish``,
            which writes the profile of what there is.
        probe: Record what a minute can tell, instead of everything.
        resume: Go on with a recording that was begun.
        targets: Models whose shapes are measured; by default those that are known.
    """

    kind: str
    folder: Path
    name: str | None = None
    seconds: float = 600.0
    part: str = ALL_PARTS
    probe: bool = False
    resume: bool = False
    targets: Mapping[str, Variation] | None = None

    def __post_init__(self) -> None:
        for what, value, known in (
            ("device", self.kind, KINDS),
            ("part", self.part, PARTS),
        ):
            if value not in known:
                raise ProfileError(
                    f"the {what} of a recording is one of {', '.join(known)}, found "
                    f"{value!r}"
                )
        if self.seconds <= 0:
            raise ProfileError(f"a recording takes time, found {self.seconds:g} s")

    def kernel_points(self) -> list[Point]:
        """List the points of kernels, the most important first."""
        targets = None if self.targets is None else list(self.targets.values())
        make = probe_plan if self.probe else kernel_plan
        return make(self.kind, targets)

    def model_points(self) -> list[Point]:
        """List the points of whole models; none of a probe."""
        return [] if self.probe else model_plan(self.kind, self.targets)


@dataclass(frozen=True)
class Outcome:
    """What came of a recording.

    Attributes:
        work: The folder of its journal.
        profile: Where the profile was written; None if only a part was recorded.
        complete: True if all points of what was asked for are done.
        points: Points in the journal.
        quality: As the header of a profile has it.
    """

    work: Path
    profile: Path | None
    complete: bool
    points: int
    quality: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One kernel of a plan, for people: points, shapes and the seconds they take."""

    what: str
    points: int
    shapes: int
    seconds: float


def plan_lines(order: Order) -> list[PlanLine]:
    """Sum a plan up, kernel by kernel, in order."""
    grouped: dict[str, list[Point]] = {}
    for point in [*order.kernel_points(), *order.model_points()]:
        name = "whole models" if point.op.startswith("model_") else point.kernel
        grouped.setdefault(name, []).append(point)
    return [
        PlanLine(
            name,
            len(points),
            len({(p.n, p.k, p.heads, p.batch) for p in points}),
            sum(seconds_of(p, order.kind) for p in points),
        )
        for name, points in grouped.items()
    ]


def record(
    order: Order, *, timer: Timer | None = None, tell: Tell = lambda _: None
) -> Outcome:
    """Record what is asked for, until it is done or time is up.

    Args:
        order: What is to be recorded.
        timer: Takes the times; by default the device's own.
        tell: Is told of progress.

    Raises:
        ProfileError: If the device is not there, or the journal cannot be used.
    """
    if order.kind == "cuda" and not torch.cuda.is_available():
        raise ProfileError(
            "there is no CUDA device here, or torch was built without CUDA. Record "
            "this machine's processor with --device cpu"
        )
    start = perf_counter()
    seconds = min(order.seconds, PROBE_S) if order.probe else order.seconds
    work = _work_folder(order)
    resume = order.resume or order.part == FINISH_PART
    journal = Journal(work, about(order.kind), resume=resume)
    try:
        tell_state(order.kind, journal, "before")
        with one_thread() if order.kind == "cpu" else nullcontext():
            complete = _record_parts(order, journal, timer, seconds, tell)
        tell_state(order.kind, journal, "after")
        journal.spent(perf_counter() - start)
    except RuntimeError as error:
        raise ProfileError(
            f"the recording stopped: {error}. What was timed is kept in {work}; go on "
            "behind this point with --resume"
        ) from error
    points = sorted(journal.points.values(), key=lambda point: point.order)
    quality = quality_of(points, journal.repeats)
    if order.kind == "cpu":
        points = [_faster(point, journal.repeats) for point in points]
    if order.part in (KERNELS_PART, MODELS_PART):
        return Outcome(work, None, complete, len(points), quality)
    profile = _profile(order, journal, points, quality, complete=complete)
    return Outcome(work, profile.write(order.folder), complete, len(points), quality)


def _record_parts(
    order: Order, journal: Journal, timer: Timer | None, seconds: float, tell: Tell
) -> bool:
    kernels, models = order.kernel_points(), order.model_points()
    start = perf_counter()
    if order.part in (ALL_PARTS, KERNELS_PART):
        both = order.part == ALL_PARTS and models
        own = seconds * (1 - MODELS_SHARE[order.kind]) if both else seconds
        again = REPEAT_SHARE[order.kind] * own
        timer = timer or timer_for(order.kind)
        recorder = Recorder(order.kind, journal, timer=timer, tell=tell)
        recorder.run(kernels, Deadline(start + own - again))
        recorder.repeat(kernels, Deadline(start + own))
    if order.part in (ALL_PARTS, MODELS_PART) and models:
        recorder_of_models = ModelRecorder(order.kind, journal, tell=tell)
        recorder_of_models.run(models, Deadline(start + seconds))
    asked = {KERNELS_PART: kernels, MODELS_PART: models}.get(
        order.part, [*kernels, *models]
    )
    return all(journal.done(point) for point in asked)


def _profile(
    order: Order,
    journal: Journal,
    points: Sequence[Point],
    quality: Mapping[str, Any],
    *,
    complete: bool,
) -> Profile:
    timer = timer_for(order.kind)
    method = timer.method() | {
        "seconds": round(journal.seconds, 1),
        "data": "random, never zeros",
        "weights": {
            "cuda_bytes": CUDA_BYTES,
            "caches": CACHES_CUDA if order.kind == "cuda" else CACHES_CPU,
        },
        "probe": order.probe,
        "states": journal.states,
        "key": "split by a hash of kernel, n and k, before any fit",
    }
    return Profile(
        name=_free_name(order, journal.folder.name.removesuffix(WORK)),
        device=device_facts(order.kind),
        software=software_facts(),
        method=method,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        points=points,
        quality=quality,
        complete=complete,
    )


def _faster(point: Point, repeats: Mapping[str, float]) -> Point:
    """Give a point with the shorter of its times, where it was timed once more."""
    again = repeats.get(key_of(point), point.us)
    return replace(point, us=again) if point.ok and again < point.us else point


def _free_name(order: Order, name: str) -> str:
    """Number a profile whose name is taken: none is ever changed."""
    number, found = 1, name
    while (order.folder / found).exists():
        number += 1
        found = f"{name}__{number}"
    return found


def _work_folder(order: Order) -> Path:
    """Find the folder of the journal: named, the last one begun, or a new one.

    Raises:
        ProfileError: If there is nothing to go on with.
    """
    if order.name:
        return order.folder / (order.name + WORK)
    if order.resume or order.part == FINISH_PART:
        device = _slug(device_facts(order.kind)["name"])
        begun = sorted(
            order.folder.glob(f"{device}__*{WORK}/{FILE}"),
            key=lambda path: path.stat().st_mtime,
        )
        if not begun:
            raise ProfileError(
                f"no recording of this device was begun in {order.folder}. Leave "
                "--resume out, or name the folder with --out"
            )
        return begun[-1].parent
    return order.folder / (default_name(order.kind, probe=order.probe) + WORK)


def default_name(kind: str, *, probe: bool = False) -> str:
    """Name a profile after the device, its torch and the day."""
    day = datetime.now(UTC).strftime("%Y%m%d")
    device = _slug(device_facts(kind)["name"])
    version = torch.__version__.partition("+")[0]
    return f"{device}__torch-{version}__{day}" + ("__probe" if probe else "")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
