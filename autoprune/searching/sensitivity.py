"""What every choice of a space costs by itself; kept for every later search."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from autoprune.compression.bank import VariantBank
from autoprune.errors import ConfigError, unknown_name
from autoprune.evaluation.fisher import Wanted
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import Action, Layer, Policy, Site, digest
from autoprune.searching.costings import (
    Costing,
    Errors,
    Measuring,
    Replacements,
    Scores,
    Squares,
)
from autoprune.searching.entries import Entries
from autoprune.searching.space import SearchSpace

log = logging.getLogger(__name__)

KINDS = ("error", "fisher", "outputs", "blend", "measured")
"""From the Hessian, from gradients of the dense model by windows, by single outputs and
by both, by an evaluation each."""

GRADIENTS = ("fisher", "blend")
"""Those from gradients of the dense model that allocations are solved by."""

FORMAT = 2
"""Raised when one of the kinds is computed in another way."""


@dataclass(frozen=True, eq=False)
class FisherRows:
    """Scores of every choice, which foretell the KL of whole policies.

    Attributes:
        scores: How each choice moves the log-likelihood of words that the dense model
            drew; a row a window and draw. Zero for dense and where there is no choice.
        choices: Number of choices of each site.
    """

    scores: Float[np.ndarray, "sites choices rows"]
    choices: Int[np.ndarray, " sites"]

    def predict(self, indices: Int[np.ndarray, " sites"]) -> float:
        """Foretell the KL of a policy: half the mean square of its sum of scores.

        Second order in the changes and exact in their interplay, but for the noise of
        the rows; it does not know how the model saturates under strong compression.
        """
        summed = self.scores[np.arange(len(indices)), indices].sum(0)
        return float(np.dot(summed, summed)) / (2 * len(summed))

    def predict_many(
        self, indices: Int[np.ndarray, "policies sites"]
    ) -> Float[np.ndarray, " policies"]:
        """Foretell the KL of many policies at once."""
        summed = np.zeros((len(indices), self.scores.shape[2]))
        for site, scores in enumerate(self.scores):
            summed += scores[indices[:, site]]
        foretold: Float[np.ndarray, " policies"] = np.square(summed).mean(1) / 2
        return foretold

    def costs(self) -> Float[np.ndarray, "sites choices"]:
        """Foretell the KL of each choice by itself; inf where there is none."""
        alone = np.square(self.scores, dtype=np.float64).mean(2) / 2
        absent = np.arange(alone.shape[1]) >= self.choices[:, None]
        return np.where(absent, np.inf, alone)


@dataclass(eq=False)
class Sensitivities:
    """What every choice of a space costs by itself, measured when first asked for.

    What was measured once is read from the workbench's cache, pair by pair: a space
    with one more action measures only that one.

    Attributes:
        bench: The model and its text.
        bank: Whose variants.
        space: What may be chosen.
        split: Where gradients and evaluations are taken.
        windows: How many windows of it; at most all. ``outputs`` has more of them, and
            fewer draws, two of a window at the most.
        draws: How often labels are drawn for a window's gradient.
        base: The policy in which ``measured`` replaces a choice; None for dense.
        measure: Has something measured by others; None to do so in this process.
        seconds: Seconds that the measurements of this object took, by kind.
    """

    bench: Workbench
    bank: VariantBank
    space: SearchSpace
    split: str = "fitness"
    windows: int = 8
    draws: int = 4
    base: Policy | None = None
    measure: Measuring | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def costs(self, kind: str) -> Float[np.ndarray, "sites choices"]:
        """Give what every choice costs; inf where a site has no such choice.

        Args:
            kind: ``error``: relative output error, summed over a site's layers;
                ``fisher``: second-order KL from gradients of the dense model;
                ``outputs``: the same without what changes of different outputs do to
                each other, which is biased and far less noisy;
                ``blend``: the geometric mean of these two, whose faults differ;
                ``measured``: growth of the KL when that choice alone is made.

        Raises:
            ConfigError: If the kind is unknown.
            StoreError: If what was measured cannot be written.
        """
        if kind not in KINDS:
            raise ConfigError(unknown_name("kind of sensitivity", kind, KINDS))
        if kind == "fisher":
            return self.fisher_rows().costs()
        if kind == "blend":
            product = self.costs("fisher") * self.costs("outputs")
            blend: Float[np.ndarray, "sites choices"] = np.sqrt(product)
            return blend
        table = {
            "error": self._errors,
            "outputs": self._outputs,
            "measured": self._measured,
        }[kind]()
        costs = np.full((len(self.space.sites), self._width), np.inf)
        for row, site in enumerate(self.space.sites):
            for column, action in enumerate(self.space.choices[site.name]):
                costs[row, column] = table[site, action]
        return costs

    def fisher_rows(self) -> FisherRows:
        """Give the scores of every choice, from gradients of the dense model.

        Raises:
            StoreError: If what was measured cannot be written.
        """
        seen = self._seen(self.windows)
        file = self._file("fisher", self._text(seen), self.draws)
        entries = self._by_layer(
            "fisher", file, lambda wanted: Scores(wanted, self.split, seen, self.draws)
        )
        shape = (len(self.space.sites), self._width, len(seen) * self.draws)
        scores = np.zeros(shape, dtype=np.float32)
        for row, site, column, action in self._places():
            for layer in site.layers:
                scores[row, column] += entries[self.bank.key(layer, action)]
        counts = [len(self.space.choices[site.name]) for site in self.space.sites]
        return FisherRows(scores, np.array(counts))

    def _errors(self) -> dict[tuple[Site, Action], float]:
        return self._summed("error", self._file("error"), Errors)

    def _outputs(self) -> dict[tuple[Site, Action], float]:
        # Half of ``fisher``'s draws, which cost twice as much here: of as much text as
        # there is, since more of it tells more than more labels for the same. Of little
        # text: allocations by two draws instead of eight cost 0.2 % more (measured).
        passes = max(1, self.windows * self.draws // 2)
        seen = self._seen(passes)
        draws = min(2, passes // len(seen))
        file = self._file("outputs", self._text(seen), draws)
        return self._summed(
            "outputs", file, lambda wanted: Squares(wanted, self.split, seen, draws)
        )

    def _summed(
        self, kind: str, file: Entries, costing: Callable[[Wanted], Costing]
    ) -> dict[tuple[Site, Action], float]:
        """Give the sum over each site's layers of what is known or measured of them."""
        entries = self._by_layer(kind, file, costing)
        table = dict.fromkeys(self._all_pairs(), 0.0)
        for _, site, _, action in self._places():
            keys = [self.bank.key(layer, action) for layer in site.layers]
            table[site, action] = float(sum(entries[key][0] for key in keys))
        return table

    def _measured(self) -> dict[tuple[Site, Action], float]:
        base = self.bench.per_layer(self.base) if self.base else {}
        named = {la.name: self.bank.key(la, a) for la, a in base.items() if a.steps}
        seen = self._seen(self.windows)
        file = self._file("measured", self._text(seen), named)
        stands = {  # what a base has at a site costs nothing more there
            (site, action): all(base.get(la, Action()) == action for la in site.layers)
            for site, action in self._all_pairs()
        }
        keys = {
            (site, action): digest([self.bank.key(la, action) for la in site.layers])
            for (site, action), standing in stands.items()
            if not standing
        }
        known = file.read()
        absent = [pair for pair, key in keys.items() if key not in known]
        costing = Replacements(absent, base, self.split, seen)
        known |= self._take("measured", costing, file, keys, len(absent))
        table = dict.fromkeys(stands, 0.0)
        return table | {pair: float(known[key][0]) for pair, key in keys.items()}

    def _by_layer(
        self, kind: str, file: Entries, costing: Callable[[Wanted], Costing]
    ) -> Mapping[str, Float[np.ndarray, " numbers"]]:
        """Read what is known of layers' variants, and measure what is not."""
        known = file.read()
        wanted: dict[Layer, list[Action]] = {}
        keys: dict[Any, str] = {}
        for _, site, _, action in self._places():
            for layer in site.layers:
                key = self.bank.key(layer, action)
                if key not in known:
                    wanted.setdefault(layer, []).append(action)
                    keys[layer, action] = key
        return known | self._take(kind, costing(wanted), file, keys, len(keys))

    def _take(
        self,
        kind: str,
        costing: Costing,
        file: Entries,
        keys: Mapping[Any, str],
        count: int,
    ) -> dict[str, Float[np.ndarray, " numbers"]]:
        """Measure, here or elsewhere; what comes is written at once, and kept."""
        if not count:
            return {}
        start, entries = time.perf_counter(), {}
        measure = self.measure or (lambda asked: asked.run(self.bench, self.bank))
        for costs in measure(costing):
            entries = file.add({keys[pair]: value for pair, value in costs.items()})
        self._took(kind, count, start)
        return entries

    def _took(self, kind: str, pairs: int, start: float) -> None:
        spent = time.perf_counter() - start
        self.seconds[kind] = self.seconds.get(kind, 0.0) + spent
        log.info("sensitivities %s of %d pairs took %.1f s", kind, pairs, spent)

    def _places(self) -> Iterator[tuple[int, Site, int, Action]]:
        """Walk all choices but dense, which costs nothing."""
        for row, site in enumerate(self.space.sites):
            for column, action in enumerate(self.space.choices[site.name]):
                if action.steps:
                    yield row, site, column, action

    def _all_pairs(self) -> list[tuple[Site, Action]]:
        sites = self.space.sites
        return [(site, a) for site in sites for a in self.space.choices[site.name]]

    @property
    def _width(self) -> int:
        return max(len(actions) for actions in self.space.choices.values())

    def _seen(self, windows: int) -> Sequence[int]:
        """Name the windows: the first ones, the same for every pair."""
        return range(min(windows, len(self.bench.splits[self.split].ids)))

    def _text(self, seen: Sequence[int]) -> list[Any]:
        text = self.bench.splits[self.split].fingerprint
        return [self.bench.task.name, text, len(seen)]

    def _file(self, kind: str, *about: Any) -> Entries:
        """Find the file of a kind: all that its entries share is in its name."""
        folder = self.bench.store.folder.parent / "sensitivities"
        return Entries(folder / f"{digest([FORMAT, kind, self.bank.name, *about])}.npz")
