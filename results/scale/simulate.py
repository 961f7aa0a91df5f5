"""Simulates searches with 1, 8, 64 and 512 workers: the real study, on a virtual clock.

    python results/scale/simulate.py [CELL ...] [--show] [--profile CELL]

``run_study`` with its samplers, its judge and its ledger is the real one; only workers
are not: a job ends after a time drawn from recorded runs (``recorded_times.json``), and
some lose their worker. The clock also goes on by the CPU time that the driver takes, so
that what a driver cannot keep up with is seen. The KL is a smooth formula on 210 sites
with 9 actions each.

Each cell, STRATEGY-WORKERS, is a file in ``simulated/`` and is not simulated again;
``simulation.json`` and ``simulation.png`` show them all. Some minutes of CPU time.
"""

import argparse
import cProfile
import io
import json
import pstats
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(ROOT / "tests"), str(ROOT / "results")]

from recording import Records, tell  # noqa: E402
from simulated_crew import SimulatedCrew, Times, VirtualClock  # noqa: E402
from toy_evaluators import SmoothEvaluator  # noqa: E402

from autoprune.plugins import load_plugins  # noqa: E402
from autoprune.policy import Action, Layer, Policy, Site  # noqa: E402
from autoprune.searching.budget import Budget, Prices  # noqa: E402
from autoprune.searching.crew import Job, Measure  # noqa: E402
from autoprune.searching.ends import Ends  # noqa: E402
from autoprune.searching.ledger import Ledger  # noqa: E402
from autoprune.searching.objective import Objective  # noqa: E402
from autoprune.searching.problem import Problem  # noqa: E402
from autoprune.searching.rows import Trial  # noqa: E402
from autoprune.searching.rungs import replaces  # noqa: E402
from autoprune.searching.space import SearchSpace  # noqa: E402
from autoprune.searching.study import run_study  # noqa: E402

RECORDS = Records(HERE / "simulated")

STRATEGIES = ("gradient", "evolution", "nsga2", "random")
TRIALS = {1: 120, 8: 240, 64: 640, 512: 1536}
"""Trials of a search, by its workers."""

LOST = 0.01
"""Share of the jobs that lose their worker. Assumed: of those recorded none did."""

SITES, WINDOWS = 210, 24
LEVELS = tuple(round(0.1 * level, 1) for level in range(1, 10))
BUDGET = 0.5
OBJECTIVE = Objective((("kl", "minimize"),))


@dataclass(eq=False)
class Watch:
    """Notes of every trial how stale its proposal was when its result came."""

    clock: VirtualClock
    rows: list[dict[str, float]] = field(default_factory=list)
    best: Trial | None = None
    _at: dict[str, tuple[int, int]] = field(default_factory=dict)
    _lefts: int = 0

    def proposed(self, policy: Policy) -> None:
        """Hear of a proposal that is given to a worker."""
        self._at.setdefault(policy.fingerprint, (len(self.rows), self._lefts))

    def finished(self, trial: Trial) -> None:
        """Hear of a row."""
        seen, lefts = self._at[trial.policy.fingerprint]
        row = {
            "at_s": self.clock.now(),
            "between": len(self.rows) - seen,
            "left": float(self._lefts > lefts),
            "kl": trial.values[0] if trial.values else float("nan"),
        }
        best = self.best
        if trial.feasible and (best is None or replaces(trial, best, OBJECTIVE)):
            self.best, self._lefts = trial, self._lefts + 1
        held = self.best.values[0] if self.best else float("nan")
        self.rows.append({**row, "best": held})


class WatchedCrew(SimulatedCrew):
    """Also tells a watch of every proposal."""

    watch: Watch

    def submit(self, worker: int, job: Job) -> None:
        """Draw when a job ends."""
        if isinstance(job, Measure):
            self.watch.proposed(job.policy)
        super().submit(worker, job)


def make_problem(sites: int = SITES, *, seed: int = 0) -> Problem:
    """Make sites of many sizes with nine levels, and a budget of bytes."""
    rng = np.random.default_rng(seed)
    places = []
    for index in range(sites):
        name, block = f"layers.{index}.up_proj", index // 7
        layer = Layer(name, (8, 16), "float32", block, "up_proj", f"in.{index}")
        places.append(Site(f"blocks.{block}.{index % 7}", (layer,)))
    actions = tuple(Action.parse(f"wanda(sparsity={level})") for level in LEVELS)
    space = SearchSpace(tuple(places), {site.name: actions for site in places})
    shares = 1 - np.array(LEVELS)
    sizes = rng.integers(100, 10_000, sites)
    pairs = zip(places, sizes, strict=True)
    table = {site.name: np.round(size * shares) for site, size in pairs}
    low, high = (sum(f(table[s.name]) for s in places) for f in (min, max))
    limit = Budget("size_bytes", float(low + BUDGET * (high - low)))
    return Problem(space, (Prices("size_bytes", table),), (limit,))


def uniform(problem: Problem) -> Policy:
    """Give the largest uniform policy within the budget."""
    actions = next(iter(problem.space.choices.values()))
    policies = (Policy.uniform(problem.space.sites, action) for action in actions)
    return next(policy for policy in policies if problem.within(policy))


def simulate(
    strategy: str,
    workers: int,
    trials: int,
    *,
    lost: float = LOST,
    driver: float = 1.0,
    problem: Problem | None = None,
) -> dict[str, Any]:
    """Search once.

    Args:
        strategy: Its name.
        workers: How many.
        trials: How many.
        lost: Share of the jobs that lose their worker.
        driver: Virtual seconds of a CPU second of the driver.
        problem: What is searched; the usual one by default.

    Returns:
        Throughput, staleness, quality over time, and what the driver took.
    """
    problem = problem or make_problem()
    factory = load_plugins().objects["samplers"][strategy]
    evaluator, times = SmoothEvaluator(problem, windows=WINDOWS), Times.recorded()
    with tempfile.TemporaryDirectory() as folder:
        with Ledger.open(Path(folder), {}) as ledger:
            clock = VirtualClock(driver)
            crew = WatchedCrew(evaluator, clock, workers, times, lost)
            crew.watch = Watch(clock)
            ended = run_study(
                problem,
                crew,
                ledger=ledger,
                sampler=factory,
                objective=OBJECTIVE,
                seed=0,
                ends=Ends(trials, clock=clock),
                proposals=[("uniform", uniform(problem))],
                on_trial=crew.watch.finished,
            )
            cpu_s, took_s = clock.cpu_s, clock.now()
            states = [trial.state for trial in ledger.trials()]
    return {
        "strategy": strategy,
        "workers": workers,
        "ended": ended,
        "states": {state: states.count(state) for state in sorted(set(states))},
        "losses": crew.losses,
        **_figures(crew.watch.rows, workers, times),
        "virtual_s": took_s,
        "busy": crew.busy_s / (workers * took_s),
        "driver_ms_per_trial": 1e3 * cpu_s / len(states),
        "driver_busy": driver * cpu_s / took_s,
    }


def _figures(
    rows: Sequence[dict[str, float]], workers: int, times: Times
) -> dict[str, Any]:
    """Sum up trials; rates are of the middle half, when all workers are at it."""
    at = np.array([row["at_s"] for row in rows])
    first, last = len(at) // 4, 3 * len(at) // 4
    span = max(at[last] - at[first], 1e-9)
    rate = 3600 * (last - first) / span
    ideal = 3600 * workers / float(np.mean(times.evaluate_s))
    settled = rows[min(workers, len(rows) // 2) :]
    best = [row["best"] for row in rows]
    points = np.unique(np.geomspace(1, len(rows), 60).astype(int)) - 1
    return {
        "trials": len(rows),
        "per_hour": rate,
        "ideal_per_hour": ideal,
        "of_ideal": rate / ideal,
        "between_mean": float(np.mean([row["between"] for row in settled])),
        "left_share": float(np.mean([row["left"] for row in settled])),
        "start_kl": best[0],
        "best_kl": best[-1],
        "curve": [[at[i] / 3600, best[i]] for i in points.tolist()],
    }


def cells() -> list[tuple[str, int]]:
    """List the cells, cheap ones first."""
    return [(name, workers) for workers in TRIALS for name in STRATEGIES]


def show() -> str:
    """Write the table and the picture of the cells that are there."""
    found = RECORDS.read()
    kept = [found[f"{s}-{w}"] for s, w in cells() if f"{s}-{w}" in found]
    if not kept:
        return "no cell was simulated yet\n"
    (HERE / "simulation.json").write_text(json.dumps(kept, indent=1) + "\n")
    _draw(kept)
    lines = [
        f"{row['cell']:>14}: {row['trials']:5d} trials, {row['per_hour']:9.0f} an hour "
        f"({row['of_ideal']:5.1%} of ideal), {row['between_mean']:6.1f} between, "
        f"{row['left_share']:5.1%} left, KL {row['best_kl']:8.2f}, driver "
        f"{row['driver_ms_per_trial']:6.1f} ms a trial, {row['ended']}"
        for row in kept
    ]
    return "\n".join([*lines, ""])


def _draw(kept: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    top = figure.subplots(2, len(TRIALS), sharey="row", squeeze=False)
    for column, workers in enumerate(TRIALS):
        curve, bars = top[0][column], top[1][column]
        rows = [row for row in kept if row["workers"] == workers]
        for row in rows:
            hours, best = zip(*row["curve"], strict=True)
            curve.step(hours, best, where="post", label=row["strategy"])
        curve.set_title(f"{workers} workers" if workers > 1 else "one worker")
        curve.set_xscale("log")
        curve.set_yscale("log")
        curve.set_xlabel("virtual hours")
        names = [row["strategy"] for row in rows]
        bars.bar(names, [row["of_ideal"] for row in rows], color="tab:gray")
        bars.tick_params(axis="x", rotation=30)
        bars.set_ylim(0, 1.05)
    top[0][0].set_ylabel("best KL so far")
    top[0][0].legend()
    top[1][0].set_ylabel("trials an hour, of ideal")
    figure.savefig(HERE / "simulation.png", dpi=110)


def profile(cell: str, trials: int) -> str:
    """Say where the driver's time goes in a cell."""
    strategy, workers = cell.rsplit("-", 1)
    watched, problem = cProfile.Profile(), make_problem()
    watched.runcall(simulate, strategy, int(workers), trials, problem=problem)
    text = io.StringIO()
    pstats.Stats(watched, stream=text).sort_stats("cumulative").print_stats(45)
    return text.getvalue()


def main() -> None:
    """Simulate the cells that are missing, and show all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only these; * matches anything")
    parser.add_argument("--show", action="store_true", help="simulate nothing")
    parser.add_argument("--profile", metavar="CELL")
    parser.add_argument("--trials", type=int, help="of a profile")
    arguments = parser.parse_args()
    if arguments.profile:
        sys.stdout.write(profile(arguments.profile, arguments.trials or 300))
        return
    for strategy, workers in cells() if not arguments.show else ():
        name, wanted = f"{strategy}-{workers}", arguments.cells or ["*"]
        asked = any(fnmatchcase(name, pattern) for pattern in wanted)
        if asked and RECORDS.lacks(name):
            tell(name)
            RECORDS.write(name, simulate(strategy, workers, TRIALS[workers]))
    sys.stdout.write(show())


if __name__ == "__main__":
    main()
