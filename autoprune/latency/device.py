"""What a device is, and who opens one: the abstract base that plugins finish."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from autoprune.latency.predict import Predictor


@dataclass(frozen=True, eq=False)
class Device:
    """A device, ready to predict for.

    Attributes:
        name: As its driver or its data sheet calls it.
        predictor: Predicts times on it.
        basis: What the times come from, in one line for people.
        kind: ``cuda`` or ``cpu``.
        profile: Name of the profile of this very device; None if it was not measured.
    """

    name: str
    predictor: Predictor
    basis: str
    kind: str = "cuda"
    profile: str | None = None


class LatencyBackend(ABC):
    """Opens devices by their names.

    All that are installed are asked, those of the lowest rank first; the first that
    knows the device opens it. What it predicts with is a ``Source`` of its own.

    Attributes:
        name: Unique, lower case.
        rank: Who is asked first: 0 by default, 10 for recorded profiles, 20 for data
            sheets.
    """

    name: ClassVar[str]
    rank: ClassVar[int] = 0

    @abstractmethod
    def open(self, device: str) -> Device | None:
        """Open a device; None if it is not one of this backend's.

        Args:
            device: As a user names it, never ``auto``.

        Raises:
            ProfileError: If it is, and cannot be opened.
        """
