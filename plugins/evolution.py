"""Evolution by level switches, as EvoPress does it, over actions of any kind."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.random import Generator

from autoprune.hookspecs import hookimpl
from autoprune.searching.rows import Trial
from autoprune.searching.strategies import PolicySampler, SamplerFactory, notes_of
from autoprune.searching.switches import LevelSwitches, Positions, draw, positions

LAMBDA = 16
"""Offspring a generation; EvoPress loses little from 64 down to 16, more below."""

LAST = 2
"""Offspring measured on all windows; those between fall geometrically from LAMBDA."""


ATTEMPTS = 16
"""Offspring drawn until one is new, before the last is given as it is."""


class EvolutionSampler(PolicySampler):
    """Proposes offspring of the best policy, and again those that survive.

    EvoPress (Sieberling et al., ICML 2025, arXiv:2410.14649): each of ``LAMBDA``
    offspring leaves the parent by min(U{1..3}, U{1..3}) level switches; all are
    measured on few windows, the best of them on more, and the best on all replaces the
    parent if it is better. Unlike there, the windows are those of the rungs, the same
    for every candidate, where EvoPress draws new ones at each stage and measures the
    parent again; sites of any size, and pruning and quantization, trade with each
    other; and no policy is measured twice on the same windows.

    The first parent is the best policy that is known, else one drawn at random. A
    generation stands in the rows, as notes: ``generation``, ``stage``, ``rung``, and
    ``from``, the number of the parent or, after the first stage, of the row promoted.
    """

    def propose(self) -> tuple[Int[np.ndarray, " sites"], Mapping[str, Any]]:
        """Give the next survivor of this generation, else another offspring."""
        rng = self.brief.rng()
        noted = [(trial, notes_of(trial)) for trial in self.brief.history]
        noted = [(trial, notes) for trial, notes in noted if "generation" in notes]
        last = max((notes["generation"] for _, notes in noted), default=0)
        rows = [(t, notes) for t, notes in noted if notes["generation"] == last]
        parent = self.brief.best()
        if parent is None:
            return draw(self.problem, rng), self._notes(last, 0, None, rung=-1)
        born = [(t, n) for t, n in rows if n["stage"] == 0 and n["from"] is not None]
        if born and len(born) < LAMBDA:
            begun = born[0][1]["from"]
            parent = next(t for t in self.brief.history if t.number == begun)
        elif born:
            promoted = self._survivor([trial for trial, _ in born], rows)
            if promoted is not None:
                trial, stage = promoted
                indices = positions(self.space, [trial])[0]
                return indices, self._notes(last, stage, trial.number, rung=stage)
            last += 1
        child = self._offspring(parent, rng)
        return child, self._notes(last, 0, parent.number, rung=0)

    def _notes(
        self, generation: int, stage: int, origin: int | None, *, rung: int
    ) -> dict[str, Any]:
        notes = {"generation": generation, "stage": stage, "from": origin}
        return notes | {"rung": rung} if self.brief.rungs else notes

    def _offspring(self, parent: Trial, rng: Generator) -> Positions:
        """Mutate until there is something new."""
        switches = LevelSwitches(self.problem)
        known = {row.tobytes() for row in positions(self.space, self.brief.history)}
        start = positions(self.space, [parent])[0]
        for _ in range(ATTEMPTS):
            child: Positions = switches.mutate(start, rng)
            if child.tobytes() not in known:
                break
        return child

    def _survivor(
        self, born: list[Trial], rows: Sequence[tuple[Trial, Mapping[str, Any]]]
    ) -> tuple[Trial, int] | None:
        """Find a row that has to be measured on another rung, and the stage of that."""
        rungs = self.brief.rungs
        contenders = born
        for stage in range(1, len(rungs)):
            share = stage / (len(rungs) - 1)
            count = round(LAMBDA * (LAST / LAMBDA) ** share)
            means = [(_mean(t, rungs[stage - 1]), t.number, t) for t in contenders]
            ranked = sorted(entry[:2] for entry in means if np.isfinite(entry[0]))
            kept = {number for _, number in ranked[:count]}
            reached = {n["from"]: t for t, n in rows if n["stage"] == stage}
            for _, number, trial in sorted(means, key=lambda entry: entry[:2]):
                done = len(trial.windows) >= rungs[stage] or trial.state != "pruned"
                if number in kept and not done and number not in reached:
                    return trial, stage
            contenders = [reached.get(n, t) for _, n, t in means if n in kept]
        return None


def _mean(trial: Trial, windows: int) -> float:
    """Average over the first windows; infinite where a row has no such mean."""
    if trial.state not in ("complete", "pruned"):
        return float("inf")
    if len(trial.windows) >= windows:
        return float(np.mean(trial.windows[:windows]))
    return trial.values[0] if trial.values else float("inf")


@hookimpl
def register_samplers() -> list[SamplerFactory]:
    """Return the strategy."""
    return [
        SamplerFactory(
            "evolution",
            EvolutionSampler,
            "EvoPress: level switches around the best policy; one objective",
            several=False,
        )
    ]
