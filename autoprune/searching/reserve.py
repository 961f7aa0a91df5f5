"""What comes after the trials, and how long it will take: its time is kept for it.

Estimates come from what this very run has measured: a trial tells what a window costs,
the making of the variants what solving costs, the export before the search what
writing and loading cost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from autoprune.search_config import SearchConfig
from autoprune.searching.clock import Timetable
from autoprune.searching.plan import Plan
from autoprune.searching.rivals import RANDOM, RIVALS, rival_kind
from autoprune.searching.rows import Trial

MARGIN = 1.05
"""Factor on estimates. Of half an hour on SmolLM2-135M this one leaves 1.6 % unused."""

PASSES_OF_SOLVING = 2.0
"""Forward passes over the statistics that solving a policy anew takes beside its
solvers: one through the compressed blocks, and the Hessians."""

PASSES_OF_MIXING = 4.0
"""Forward passes over the fitness split that a gradient is worth."""

START_S = 12.0
"""Of a fresh process, until it has loaded what it needs, beside the model itself."""

PASSES_OF_DENSE = 2.0
"""Forward passes that the dense model takes: it is remembered, and measured."""

PASSES_OF_VERIFYING = 2.0
"""Forward passes over the report split that an export takes after it is written."""

RIVAL_KINDS = len(RIVALS)
"""Kinds of rivals that finals may have to measure beside the finalists."""


@dataclass(frozen=True)
class Reserve:
    """Seconds that the end of a run will take, by its parts.

    Attributes:
        rank: Comparing finalists on the choice split.
        solve: Solving one of them anew.
        mix: Mixing one of them.
        report: The figures of the report split.
        export: Writing the winner, loading and measuring it in a fresh process.
        finalists: How many are solved: the best and its rival.
        recovery: Training them.
    """

    rank: float
    solve: float
    mix: float
    report: float
    export: float
    finalists: int = 2
    recovery: float = 0.0

    @property
    def last(self) -> float:
        """What has to come after all choices."""
        return self.report + self.export

    @property
    def closing(self) -> float:
        """What has to come after the finalists, whatever becomes of them."""
        return self.recovery + self.last

    def __str__(self) -> str:
        """Say what is kept for what."""
        refining = self.finalists * (self.solve + self.mix)
        training = f"{self.recovery:.0f} for recovery, " if self.recovery else ""
        return (
            f"{self.total:.0f} s: {self.rank:.0f} for the last choice, {refining:.0f} "
            f"for refining, {training}{self.report:.0f} for the report, "
            f"{self.export:.0f} for the export"
        )

    @property
    def total(self) -> float:
        """All of it."""
        return self.rank + self.finalists * (self.solve + self.mix) + self.closing

    @classmethod
    def of(
        cls, plan: Plan, table: Timetable, trials: Sequence[Trial], *, export: bool
    ) -> "Reserve":
        """Estimate, from what is known by now.

        Args:
            plan: Of the first round.
            table: What parts of the run have taken.
            trials: Those so far.
            export: Whether the winner will be exported.
        """
        windows = {name: len(split.ids) for name, split in plan.bench.splits.items()}
        settings = max(len(found) for found in plan.problem.space.choices.values())
        search = plan.config.search
        kinds = {rival_kind(trial.origin) for trial in trials} - {None}
        kinds |= {RANDOM} if "random" in search.rivals else set()
        found = cls.estimate(
            search, windows, settings, table, trials, rivals=len(kinds), export=export
        )
        asked = plan.config.recovery
        kept = asked.share * table.budget if asked and table.budget else 0.0
        return replace(found, recovery=kept)

    @classmethod
    def estimate(
        cls,
        search: SearchConfig,
        windows: Mapping[str, int],
        settings: int,
        table: Timetable,
        trials: Sequence[Trial],
        *,
        rivals: int = RIVAL_KINDS,
        export: bool,
    ) -> "Reserve":
        """Estimate from plain numbers.

        Args:
            search: How finalists are chosen and refined.
            windows: Of every split.
            settings: Actions of a site, whose variants were made together.
            table: What parts of the run have taken.
            trials: Those so far.
            rivals: Kinds of rivals among them.
            export: Whether the winner will be exported.
        """
        window = window_s(trials, table.seconds.get("dense"), windows["fitness"])
        put, candidates = put_s(trials), search.finalists + rivals
        solve = PASSES_OF_SOLVING * windows["statistics"] * window
        solve += table.seconds.get("variants", 0.0) / settings
        measured = windows["choice"] * window
        mix = PASSES_OF_MIXING * windows["fitness"] * window + measured
        asked, start = search.refine, table.clock.real(START_S)
        written = table.seconds.get("preflight", start)
        fresh = start + PASSES_OF_VERIFYING * windows["report"] * window
        return cls(
            rank=MARGIN * ((candidates + 1.5) * measured + candidates * put),
            solve=MARGIN * (solve + measured) if asked != "none" else 0.0,
            mix=MARGIN * mix if asked == "mix" else 0.0,
            report=MARGIN * (rivals + 1.5) * windows["report"] * window,
            export=MARGIN * (written + fresh) if export else 0.0,
        )


def put_s(trials: Sequence[Trial]) -> float:
    """Tell what putting a policy on the model takes: the median of the last trials.

    The first one does not count: it may read all it needs from a cold disk.
    """
    last = [trial for trial in trials[1:][-20:] if trial.windows]
    found = [trial.timings.get("put_s", 0.0) for trial in last]
    return median(found) if found else 0.0


def window_s(
    trials: Sequence[Trial], dense_s: float | None, fitness_windows: int
) -> float:
    """Tell what measuring one window takes: of the last trials, else of the dense one.

    Args:
        trials: So far.
        dense_s: Seconds that the dense model took on the fitness split; None if that is
            not known.
        fitness_windows: Of that split.
    """
    measured = [trial for trial in trials[-20:] if trial.windows]
    if measured:
        spent = math.fsum(trial.timings.get("evaluate_s", 0.0) for trial in measured)
        return spent / sum(len(trial.windows) for trial in measured)
    return (dense_s or 0.0) / fitness_windows / PASSES_OF_DENSE
