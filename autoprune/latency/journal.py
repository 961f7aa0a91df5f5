"""The working file of a recording: a line of JSON for every point, as it comes.

A recording may be killed at any time. Another one goes on with the same file: what
stands there is not timed again, and a point that took its process down twice is given
up. A line that was cut off is dropped.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from autoprune.errors import ProfileError
from autoprune.latency.profiles import Point

FILE = "points.jsonl"

TRIES = 2
"""Starts of a point after which, without an end, it is not tried again."""

_KEY = [
    one.name
    for one in fields(Point)
    if one.name
    not in ("us", "us_min", "us_p90", "repeats", "algorithm", "status", "order", "note")
]


def key_of(point: Point) -> str:
    """Give what tells a point from all others, whatever came of it."""
    return json.dumps([getattr(point, name) for name in _KEY])


class Journal:
    """Points that are done, on disk.

    Args:
        folder: Made if it is not there.
        about: What a recording must share with the one that began it: device and
            software. Kept in the first line.
        resume: Go on with what is there.

    Raises:
        ProfileError: If there is a journal already and it is not to be resumed, or it
            was begun on another machine.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], *, resume: bool) -> None:
        self.folder, self._path = folder, folder / FILE
        self.points: dict[str, Point] = {}
        self.repeats: dict[str, float] = {}
        self.states: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.begun: Counter[str] = Counter()
        if self._path.exists() and not resume:
            raise ProfileError(
                f"a recording was begun in {folder}. Go on with it by --resume, remove "
                "the folder, or record under another --name"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProfileError(
                f"cannot keep a recording in {folder}: {error}. Name another folder "
                "with --out"
            ) from error
        lines = self._load()
        if not lines:
            self._write({"about": dict(about)})
        elif lines[0].get("about") != json.loads(json.dumps(dict(about))):
            raise ProfileError(
                f"{self._path} was begun on another device or with other software: "
                f"{lines[0].get('about')}, here {dict(about)}. Record under another "
                "--name"
            )

    def _load(self) -> list[dict[str, Any]]:
        """Read all whole lines, and cut off what is left of one that is not."""
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
            for line in lines:
                self._take(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ProfileError(
                f"cannot read {self._path}: {error!r}. Remove its folder and record "
                "anew"
            ) from error
        return lines

    def _take(self, line: Mapping[str, Any]) -> None:
        if "point" in line:
            point = Point(**line["point"])
            self.points[key_of(point)] = point
        elif "begin" in line:
            self.begun[line["begin"]] += 1
        elif "again" in line:
            self.repeats[line["again"]] = line["us"]
        elif "state" in line:
            self.states.append(line["state"])
        elif "seconds" in line:
            self.seconds += line["seconds"]

    def done(self, point: Point) -> bool:
        """Tell whether a point needs no timing any more."""
        return key_of(point) in self.points

    def given_up(self, point: Point) -> bool:
        """Tell whether a point took its process down as often as is tried."""
        return self.begun[key_of(point)] >= TRIES

    def begin(self, point: Point) -> None:
        """Note that a point is tried: if it has no end, something went badly wrong."""
        self._write({"begin": key_of(point)})

    def add(self, point: Point) -> None:
        """Keep a point, timed or with the reason why it is not."""
        self._write({"point": asdict(point)})

    def again(self, point: Point, us: float) -> None:
        """Keep the time of a point that was timed once more."""
        self._write({"again": key_of(point), "us": us})

    def tell_state(self, state: Mapping[str, Any]) -> None:
        """Keep how the machine was."""
        self._write({"state": dict(state)})

    def spent(self, seconds: float) -> None:
        """Keep how long a recording ran."""
        self._write({"seconds": seconds})

    def _write(self, line: Mapping[str, Any]) -> None:
        """Append a line and hand it to the system: a killed process loses nothing."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._take(line)
