"""Profiles of devices on disk: what was measured, on what, with what, and how well.

A folder holds ``profile.json`` and ``points.parquet``. It is written once and never
edited; a hash ties the two together.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from autoprune.errors import ProfileError, unknown_name

SCHEMA = 1
"""Major version of the layout; a reader refuses a newer one."""

PROFILES = "results/profiles"
"""Where profiles are written, and looked for."""

OWN_PROFILES = "AUTOPRUNE_PROFILES"
"""Names another folder of the user's profiles."""

HEADER, POINTS = "profile.json", "points.parquet"

FIT, HOLDOUT, VALIDATION = "fit", "holdout", "validation"
"""What a point is for: the table, its test, or the test of whole models."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement.

    Attributes:
        op: ``gemm``, ``attn_prefill``, ``attn_decode``, ``copy``, ``launch``,
            ``model_prefill`` or ``model_decode``.
        kernel: Exact name of the kernel; of a model, the name of its variation.
        us: Median microseconds of one call.
        us_min: The fastest.
        us_p90: Nine of ten are as fast.
        repeats: Timings taken.
        m: Rows that go through: tokens.
        n: Outputs.
        k: Inputs.
        batch: Sequences.
        context: Tokens attended to, the new ones included.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        algorithm: What a search over a library's algorithms chose; -1 for no search.
        split: ``fit``, ``holdout`` or ``validation``.
        status: ``ok``, or why there is no time.
        order: When it was taken, counted.
        note: What else tells one point from another, as JSON.
    """

    op: str
    kernel: str
    us: float
    us_min: float = 0.0
    us_p90: float = 0.0
    repeats: int = 0
    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 0
    context: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    algorithm: int = -1
    split: str = FIT
    status: str = "ok"
    order: int = 0
    note: str = ""

    @property
    def ok(self) -> bool:
        """True if it was timed."""
        return self.status == "ok"

    @property
    def spread(self) -> float:
        """How far nine of ten timings lie above the median, over the median."""
        return self.us_p90 / self.us - 1 if self.us else 0.0


def split_of(kernel: str, n: int, k: int, share: float = 0.2) -> str:
    """Say what a shape is for, by a hash: whole shapes are held out, before any fit."""
    digest = hashlib.sha256(f"{kernel} {n} {k}".encode()).digest()
    return HOLDOUT if digest[0] < 256 * share else FIT


@dataclass(frozen=True, eq=False)
class Profile:
    """What was recorded of one device.

    Attributes:
        name: Unique: device, date and a few digits.
        device: ``kind`` (``cuda`` or ``cpu``), ``name``, and what it has: memory,
            caches, clocks seen, compute ``capability``.
        software: Versions of all that decides kernels.
        method: How time was taken.
        created: When, in UTC.
        points: All points.
        quality: Repeatability and drift, as the recorder saw them.
        complete: False if the deadline came before the last point.
    """

    name: str
    device: Mapping[str, Any]
    software: Mapping[str, Any]
    method: Mapping[str, Any]
    created: str
    points: Sequence[Point]
    quality: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def kind(self) -> str:
        """``cuda`` or ``cpu``."""
        return str(self.device["kind"])

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of a GPU; (0, 0) of anything else."""
        major, minor = self.device.get("capability", (0, 0))
        return int(major), int(minor)

    @cached_property
    def timed(self) -> list[Point]:
        """The points that have a time."""
        return [point for point in self.points if point.ok]

    def of(self, op: str, *, split: str | None = None) -> list[Point]:
        """List the timed points of an operation."""
        return [
            point
            for point in self.timed
            if point.op == op and split in (None, point.split)
        ]

    def write(self, folder: Path) -> Path:
        """Write the profile into a new folder of its name.

        Raises:
            ProfileError: If there is one already, or it cannot be written.
        """
        target = folder / self.name
        if target.exists():
            raise ProfileError(
                f"{target} exists. A profile is never changed; record under another "
                "name, or remove it yourself"
            )
        part = folder / f".{self.name}.{os.getpid()}.part"
        try:
            part.mkdir(parents=True)
            _write_points(self.points, part / POINTS)
            header = {
                "schema": SCHEMA,
                "name": self.name,
                "created": self.created,
                "device": dict(self.device),
                "software": dict(self.software),
                "method": dict(self.method),
                "quality": dict(self.quality),
                "complete": self.complete,
                "points": len(self.points),
                "points_sha256": _hash(part / POINTS),
            }
            (part / HEADER).write_text(json.dumps(header, indent=2) + "\n")
            os.replace(part, target)
        except OSError as error:
            raise ProfileError(f"cannot write the profile {target}: {error}") from error
        return target

    @classmethod
    def read(cls, folder: Path) -> "Profile":
        """Read a profile.

        Raises:
            ProfileError: If it is missing, damaged, or of a newer layout.
        """
        try:
            header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
            schema = header["schema"]
            if type(schema) is not int or schema > SCHEMA:
                raise ProfileError(
                    f"the profile {folder} has schema {schema!r}, this AutoPrune reads "
                    f"up to {SCHEMA}. Update AutoPrune"
                )
            if (found := _hash(folder / POINTS)) != header["points_sha256"]:
                raise ProfileError(
                    f"{folder / POINTS} is not what was recorded: its SHA-256 is "
                    f"{found[:12]}..., the header says {header['points_sha256'][:12]}"
                    "... Fetch it again, or record anew with `autoprune profile`"
                )
            known = {one.name for one in fields(cls)} - {"points"}
            data = {name: value for name, value in header.items() if name in known}
            return cls(**data, points=_read_points(folder / POINTS))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProfileError(
                f"cannot read the profile {folder}: {error!r}. It should hold {HEADER} "
                f"and {POINTS}; record one with `autoprune profile`"
            ) from error


def profiles_that_ship() -> dict[str, Path]:
    """Name the recorded profiles that ship, the newest last."""
    folder = Path(str(files("autoprune.latency") / "recorded"))
    return {
        path.parent.name: path.parent for path in sorted(folder.glob(f"*/{HEADER}"))
    }


def known_profiles() -> dict[str, Path]:
    """Name the profiles that ship and then the user's own, the newest last.

    These lie in ``$AUTOPRUNE_PROFILES``, or where ``autoprune profile`` writes them.
    """
    folder = Path(os.environ.get(OWN_PROFILES) or PROFILES)
    own = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{HEADER}"))}
    return profiles_that_ship() | own


def find_profile(name: str | Path) -> Profile:
    """Read a profile by its folder, or by its name.

    Raises:
        ProfileError: If there is neither; lists near misses.
    """
    if (Path(name) / HEADER).is_file():
        return Profile.read(Path(name))
    known = known_profiles()
    if str(name) not in known:
        raise ProfileError(
            f"{unknown_name('profile', str(name), known)}. Name one of these, or the "
            f"folder of one (looked in {Path.cwd()})"
        )
    return Profile.read(known[str(name)])


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_points(points: Iterable[Point], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [asdict(point) for point in points]
    names = [one.name for one in fields(Point)]
    table = pa.table({name: [row[name] for row in rows] for name in names})
    parquet.write_table(table, path, compression="zstd")


def _read_points(path: Path) -> list[Point]:
    from pyarrow import parquet

    known = {one.name for one in fields(Point)}
    rows = parquet.read_table(path).to_pylist()
    return [Point(**{k: v for k, v in row.items() if k in known}) for row in rows]
