"""What is to be measured of choices, as plain data: whole, or in shares for workers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from autoprune.compression.bank import VariantBank
from autoprune.compression.shares import Share
from autoprune.evaluation.fisher import Wanted, output_squares, score_rows
from autoprune.evaluation.sensitivity import output_errors, replacement_costs
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import Action, Layer, Site

Costs = Mapping[tuple[Layer | Site, Action], Float[np.ndarray, " numbers"]]
"""What was measured of each action of a layer or of a site."""

CHANGES = 8
"""Evaluations that a worker makes in one go; all are lost with it."""


class Costing(ABC):
    """Something to be measured of choices."""

    @abstractmethod
    def run(self, bench: Workbench, bank: VariantBank) -> Iterator[Costs]:
        """Measure, and give what is found as it comes.

        Raises:
            MethodError: If a step refuses a layer.
            StoreError: If variants cannot be written or read.
        """

    @abstractmethod
    def shares(self, workers: int) -> Sequence["Costing"]:
        """Part it, so that several workers have about as much to do."""

    def joined(self, parts: Iterator[tuple[int, Costs]]) -> Iterator[Costs]:
        """Put together what was found of the shares, whose places come with them."""
        for _, found in parts:
            yield found


Measuring = Callable[[Costing], Iterator[Costs]]
"""Has something measured, by whomever."""


@dataclass(frozen=True, eq=False)
class Errors(Costing):
    """Relative errors of what layers give; shared out by blocks."""

    wanted: Wanted

    def run(self, bench: Workbench, bank: VariantBank) -> Iterator[Costs]:
        """Measure; see ``output_errors``."""
        yield _by_pair(self.wanted, output_errors(bank, self.wanted))

    def shares(self, workers: int) -> Sequence["Errors"]:
        """Give each worker some blocks; each passes over all of them."""
        shares = [Share(index, workers) for index in range(workers)]
        parts = [
            {la: acts for la, acts in self.wanted.items() if share.has(la.block)}
            for share in shares
        ]
        return [Errors(part) for part in parts if part]


@dataclass(frozen=True, eq=False)
class Gradients(Costing):
    """What gradients of the dense model say; shared out by windows.

    Attributes:
        wanted: Layers with their actions.
        split: Where gradients are taken.
        windows: Of the split.
        draws: How often labels are drawn for each.
    """

    wanted: Wanted
    split: str
    windows: Sequence[int]
    draws: int

    def shares(self, workers: int) -> Sequence["Gradients"]:
        """Give each worker some windows that follow each other."""
        parts = np.array_split(self.windows, min(workers, len(self.windows)))
        return [replace(self, windows=part.tolist()) for part in parts]


class Scores(Gradients):
    """Scores, a row a window and draw; see ``score_rows``."""

    def run(self, bench: Workbench, bank: VariantBank) -> Iterator[Costs]:
        """Measure."""
        teacher = bench.teacher(self.split)
        rows = score_rows(bank, teacher, self.wanted, self.windows, draws=self.draws)
        yield _by_pair(self.wanted, {layer: one.T for layer, one in rows.items()})

    def joined(self, parts: Iterator[tuple[int, Costs]]) -> Iterator[Costs]:
        """Put rows behind each other, in the order of the windows."""
        found = [costs for _, costs in sorted(parts, key=lambda part: part[0])]
        yield {pair: np.concatenate([one[pair] for one in found]) for pair in found[0]}


class Squares(Gradients):
    """Second-order KL by single outputs; see ``output_squares``."""

    def run(self, bench: Workbench, bank: VariantBank) -> Iterator[Costs]:
        """Measure."""
        teacher = bench.teacher(self.split)
        found = output_squares(
            bank, teacher, self.wanted, self.windows, draws=self.draws
        )
        yield _by_pair(self.wanted, found)

    def joined(self, parts: Iterator[tuple[int, Costs]]) -> Iterator[Costs]:
        """Average over all windows, each of which counts the same."""
        found = [costs for _, costs in sorted(parts, key=lambda part: part[0])]
        counts = [len(part) for part in np.array_split(self.windows, len(found))]
        yield {
            pair: np.average([one[pair] for one in found], axis=0, weights=counts)
            for pair in found[0]
        }


@dataclass(frozen=True, eq=False)
class Replacements(Costing):
    """Growth of the KL when a choice alone is made; shared out by choices.

    Attributes:
        pairs: Sites with the action that each is to take.
        base: Actions of layers in which they are made; dense where it names none.
        split: Where the KL is measured.
        windows: Of the split.
    """

    pairs: Sequence[tuple[Site, Action]]
    base: Mapping[Layer, Action]
    split: str
    windows: Sequence[int]

    def run(self, bench: Workbench, bank: VariantBank) -> Iterator[Costs]:
        """Measure, one by one; see ``replacement_costs``."""
        changes = (dict.fromkeys(site.layers, action) for site, action in self.pairs)
        teacher = bench.teacher(self.split)
        costs = replacement_costs(bank, teacher, changes, self.windows, base=self.base)
        for pair, cost in zip(self.pairs, costs, strict=True):
            yield {pair: np.array([cost])}

    def shares(self, workers: int) -> Sequence["Replacements"]:
        """Part them into few at a time: what is lost with a worker is little."""
        return [
            replace(self, pairs=self.pairs[at : at + CHANGES])
            for at in range(0, len(self.pairs), CHANGES)
        ]


def _by_pair(wanted: Wanted, found: Mapping[Layer, np.ndarray]) -> Costs:
    """Lay out what was found of each layer's actions, in their order, pair by pair."""
    return {
        (layer, action): np.atleast_1d(value)
        for layer, values in found.items()
        for action, value in zip(wanted[layer], values, strict=True)
    }
