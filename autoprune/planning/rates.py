"""How fast a device does what runs are made of: recorded, or by its data sheet.

Records are made by ``results/scale/rates.py``. A GPU that nobody has recorded does
products at a share of what its data sheet says, and whatever a processor does beside
them takes what a recorded processor takes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from autoprune.errors import ProfileError
from autoprune.latency.devices import Datasheet, find_datasheet
from autoprune.latency.opening import AUTO, CPU, processor_name

RATES = Path("results/scale/rates")
"""Where records are written, and looked for beside those that ship."""

ON_PAPER = "from the data sheet, not measured"
"""What stands wherever a figure of a GPU comes from a data sheet alone."""

SPREAD = 1.5
"""Factor up and down within which recorded rates are thought to foretell a run."""

PAPER_PRODUCTS = (0.65, 0.35, 0.12)
"""Shares of a data sheet's bfloat16 that forward passes are thought to reach: of the
best, the usual, the worst case."""

PAPER_SOLVERS = (0.40, 0.10, 0.01)
"""The same of its float32 for Hessians and for solvers, whose sweeps go column by
column."""


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds: as expected, and between which two.

    Attributes:
        low: In the best case.
        middle: As expected.
        high: In the worst case.
    """

    low: float = 0.0
    middle: float = 0.0
    high: float = 0.0

    def __add__(self, other: "Span") -> "Span":
        return Span(
            self.low + other.low, self.middle + other.middle, self.high + other.high
        )

    def __mul__(self, factor: float) -> "Span":
        return Span(self.low * factor, self.middle * factor, self.high * factor)


def total(spans: Sequence[Span]) -> Span:
    """Add spans up, as if all cases came together."""
    return sum(spans, Span())


@dataclass(frozen=True, eq=False)
class Rates:
    """How fast a device is.

    Attributes:
        device: Its name.
        record: What a processor was measured to do.
        sheet: The data sheet of a GPU that does the products; None for the processor.
    """

    device: str
    record: Mapping[str, Any]
    sheet: Datasheet | None = None

    @property
    def basis(self) -> str:
        """Say where figures come from."""
        recorded = f"{self.record['device']}, recorded {self.record['date']}"
        if self.sheet is None:
            return f"{recorded}, one thread of {self.record['cores']} cores"
        return f"{self.sheet.name}: {ON_PAPER}; what is no product: {recorded}"

    @property
    def memory_bytes(self) -> float:
        """Memory of the device: of the GPU, or of the machine."""
        if self.sheet is not None:
            return self.sheet.memory_gb * 1e9
        return float(self.record["memory_bytes"])

    @property
    def compute(self) -> str:
        """Name the type that it computes in."""
        fast = self.sheet is not None or self.record["bfloat16"]
        return "bfloat16" if fast else "float32"

    def products(self, flop: float, width: int, kind: str | None = None) -> Span:
        """Tell how long forward passes take.

        Args:
            flop: Their operations.
            width: Of the hidden state: wide products are faster.
            kind: Type; the one that is computed in by default.
        """
        if self.sheet is not None:
            return _paper(flop, self.sheet.tera["bf16"], PAPER_PRODUCTS)
        wanted = kind or self.compute
        rows = [one for one in self.record["products"] if one["type"] == wanted]
        return _measured(flop / _between(rows, "width", "flop_s", width))

    def head(self, flop: float) -> Span:
        """Tell how long products with a head take, and what is made of its logits."""
        if self.sheet is not None:
            return _paper(flop, self.sheet.tera["bf16"], PAPER_PRODUCTS)
        return _measured(flop / self.record["head_flop_s"])

    def hessians(self, flop: float, width: int) -> Span:
        """Tell how long sums of squares take."""
        if self.sheet is not None:
            return _paper(flop, self.sheet.tera["fp32"], PAPER_SOLVERS)
        return _measured(
            flop / _between(self.record["hessians"], "width", "flop_s", width)
        )

    def methods(self, seconds: float) -> Span:
        """Tell how long methods take that take so long on the recorded processor."""
        if self.sheet is None:
            return _measured(seconds)
        flop = seconds * self._hessian_flop_s
        return _paper(flop, self.sheet.tera["fp32"], PAPER_SOLVERS)

    def other(self, seconds: float) -> Span:
        """Tell how long takes what is no product and runs on a processor anyway."""
        return _measured(seconds)

    def written(self, size: float) -> Span:
        """Tell how long a disk takes to write so many bytes."""
        return _measured(size / 1e6 / self.record["write_mb_s"])

    def call_s(
        self, method: str, settings: int, rows: int, columns: int, *, hessian: bool
    ) -> float:
        """Tell the seconds of a call of a method on the recorded processor.

        Args:
            method: Its name; one that was not recorded takes what the slowest of its
                sort takes.
            settings: How many at once.
            rows: Of all layers together.
            columns: Of each.
            hessian: Whether it reads a Hessian: then one factorisation serves all.
        """
        known = self.record["methods"].get(method) or self._slowest
        first, each = zip(*(_parts(row, hessian) for row in known), strict=True)
        sides = [float(row["side"]) for row in known]
        of_first = _at(sides, first, columns)
        of_each = _at(sides, each, columns)
        power = 2 if hessian else 1
        once = of_first * float(columns) ** 3
        return once + of_each * settings * rows * float(columns) ** power

    def knows(self, method: str) -> bool:
        """Tell whether a method was recorded."""
        return method in self.record["methods"]

    @cached_property
    def _slowest(self) -> Sequence[Mapping[str, Any]]:
        known: list[Sequence[Mapping[str, Any]]] = list(self.record["methods"].values())
        return max(known, key=lambda rows: rows[-1]["one_s"] / rows[-1]["side"] ** 2)

    @cached_property
    def _hessian_flop_s(self) -> float:
        return float(self.record["hessians"][-1]["flop_s"])


def find_rates(device: str) -> Rates:
    """Find how fast a device is.

    Args:
        device: ``cpu`` or ``auto`` for this machine's processor; the name of a GPU such
            as ``h100``; the path of a record.

    Raises:
        ProfileError: If nothing is known of it; lists near misses.
    """
    if device.endswith(".json"):
        record = _read(Path(device))
        return Rates(record["device"], record)
    known = known_records()
    if device in (AUTO, CPU):
        own = processor_name()
        if own not in known:
            raise ProfileError(
                f"the processor {own!r} was not recorded. Record it with `python "
                f"results/scale/rates.py` (recorded: {', '.join(known) or 'none'}), or "
                "name a GPU such as h100"
            )
        return Rates(own, known[own])
    if device in known:
        return Rates(device, known[device])
    sheet = find_datasheet(device)
    if not known:
        raise ProfileError(
            f"{sheet.name} is known on paper, but no processor was recorded for what "
            "is no product. Record yours with `python results/scale/rates.py`"
        )
    return Rates(sheet.name, next(iter(known.values())), sheet)


def known_records() -> dict[str, Mapping[str, Any]]:
    """Read all records, by processor; a user's own stand before those that ship."""
    shipped = files("autoprune.planning").joinpath("recorded")
    own = sorted(RATES.glob("*.json")) if RATES.is_dir() else []
    paths = [*own, *sorted(Path(str(shipped)).glob("*.json"))]
    found: dict[str, Mapping[str, Any]] = {}
    for path in paths:
        record = _read(path)
        found.setdefault(record["device"], record)
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lacking = {"device", "products", "hessians", "methods", "date"} - record.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ProfileError(
            f"cannot read the rates in {path}: {error}. Record them with `python "
            "results/scale/rates.py`"
        ) from error
    if lacking:
        raise ProfileError(
            f"the rates in {path} lack {min(lacking)!r}. Record them again with "
            "`python results/scale/rates.py`"
        )
    return record


def _paper(flop: float, tera: float, shares: Sequence[float]) -> Span:
    best, usual, worst = (flop / (tera * 1e12 * share) for share in shares)
    return Span(best, usual, worst)


def _measured(seconds: float) -> Span:
    return Span(seconds / SPREAD, seconds, seconds * SPREAD)


def _parts(row: Mapping[str, Any], hessian: bool) -> tuple[float, float]:
    """Part a call into what is done once and what each setting takes, a weight."""
    side, one = float(row["side"]), float(row["one_s"])
    if not hessian:
        return 0.0, one / side**2
    more = (float(row["many_s"]) - one) / max(1, row["settings"] - 1)
    each = min(one, more) if row["settings"] > 1 else one
    return (one - each) / side**3, each / side**3


def _between(
    rows: Sequence[Mapping[str, Any]], name: str, value: str, at: float
) -> float:
    ordered = sorted(rows, key=lambda row: float(row[name]))
    places = [float(row[name]) for row in ordered]
    return _at(places, [float(row[value]) for row in ordered], at)


def _at(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """Interpolate over the logarithm of a place; beyond the ends stay the same."""
    if at <= places[0] or len(places) == 1:
        return values[0]
    for index in range(1, len(places)):
        low, high = places[index - 1], places[index]
        if at <= high:
            share = math.log(at / low) / math.log(high / low)
            return values[index - 1] * (1 - share) + values[index] * share
    return values[-1]
