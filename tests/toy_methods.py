"""The smallest methods there are, one a kind, which tell how they were called."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from autoprune.compression.method import (
    CompressionMethod,
    Parameter,
    Settings,
    Source,
)
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer


@dataclass(frozen=True)
class Call:
    """One call of ``compress``: layers, settings, tokens, and what came before."""

    layers: list[str]
    settings: list[float]
    tokens: int
    masked: bool


class Toy(CompressionMethod):
    """Keeps calls for tests to look at; methods of plugins have no such state."""

    reference = "none"

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def note(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        values: list[float],
    ) -> None:
        names = [source.layer.name for source in sources]
        masked = any(source.variant.mask is not None for source in sources)
        self.calls.append(Call(names, values, statistics.tokens, masked))


class Columns(Toy):
    """Removes the whole columns that are least, by their inputs' norms or by number."""

    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("keep", int, 2, "Columns to keep.", 1, 4096),
        Parameter("loud", bool, False, "Nothing."),
    )

    def __init__(self, name: str, needs: frozenset[str]) -> None:
        super().__init__()
        self.name = name  # type: ignore[misc]
        self.needs = needs  # type: ignore[misc]

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        if previous.mask is not None:
            return f"already pruned ({previous.mask})"
        return None

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        return previous.masked(layer.shape[0] * settings["keep"], "bitmap")

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        self.note(sources, statistics, [one["keep"] for one in settings])
        return [
            [self._prune(source.variant, statistics, one["keep"]) for one in settings]
            for source in sources
        ]

    def _prune(
        self, variant: Variant, statistics: InputStatistics, keep: int
    ) -> Variant:
        weight = variant.weight
        if "hessian" in self.needs:
            assert statistics.hessian is not None
            score = statistics.hessian.diagonal()
        elif "input_norm" in self.needs:
            assert statistics.square_sum is not None
            score = statistics.square_sum
        else:
            score = -torch.arange(weight.shape[1]).float()
        kept = torch.zeros_like(weight, dtype=torch.bool)
        kept[:, score.topk(keep).indices] = True
        return variant.pruned(weight, kept)


class Round(Toy):
    """Rounds to a grid between the extremes of a row."""

    name = "round"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("bits", int, 4, "Bits of a code.", 2, 8),
    )

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        return previous.quantized(settings["bits"], None, True)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        self.note(sources, statistics, [one["bits"] for one in settings])
        made = []
        for source in sources:
            weight = source.variant.weight.float()
            variants = []
            for one in settings:
                middle = 2 ** (one["bits"] - 1)
                scales = weight.abs().amax(1, keepdim=True) / (middle - 1)
                codes = (weight / scales).round() + middle
                variants.append(
                    source.variant.quantized(
                        codes.byte(), scales, None, bits=one["bits"], group=None
                    )
                )
            made.append(variants)
        return made


def toys() -> dict[str, Toy]:
    """Make one method of every kind: data-free, norms, Hessian, quantization."""
    made: list[Toy] = [
        Columns("early", frozenset()),
        Columns("norm", frozenset({"input_norm"})),
        Columns("curve", frozenset({"hessian"})),
        Round(),
    ]
    return {method.name: method for method in made}
