"""Trials a minute with one worker and with two, on SmolLM2-135M.

    python results/scale/workers.py

Each worker has one thread. The space is ``quick``; the strategy draws at random, so
that every trial costs the same whatever came before. Rounds of one and two workers take
turns; the first trials of each worker, which fill its memory, do not count.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]

from autoprune.config import RunConfig  # noqa: E402
from autoprune.plugins import load_plugins  # noqa: E402
from autoprune.run import find_space  # noqa: E402
from autoprune.searching.crew import Crew, LocalCrew  # noqa: E402
from autoprune.searching.ends import Ends  # noqa: E402
from autoprune.searching.ledger import Ledger  # noqa: E402
from autoprune.searching.plan import Plan  # noqa: E402
from autoprune.searching.recipe import Recipe  # noqa: E402
from autoprune.searching.study import run_study  # noqa: E402
from autoprune.searching.workers import ProcessCrew  # noqa: E402

TRIALS, WARM = 24, 4
"""Trials of a round that count for each worker, and those before that do not."""

ROUNDS = 3


def rate(plan: Plan, crew: Crew, folder: Path) -> float:
    """Give trials a minute: of all but the first ones of each worker."""
    ended: list[float] = []
    with Ledger.open(folder, {}) as ledger:
        run_study(
            plan.problem,
            crew,
            ledger=ledger,
            sampler=plan.plugins.get("samplers", "random"),
            objective=plan.objective,
            seed=0,
            ends=Ends((TRIALS + WARM) * crew.size),
            on_trial=lambda trial: ended.append(time.monotonic()),
        )
    counted = ended[WARM * crew.size - 1 :]
    return 60 * (len(counted) - 1) / (counted[-1] - counted[0])


def main() -> None:
    """Measure, print, and write ``workers.json``."""
    config = RunConfig.from_yaml(find_space("quick"))
    plan = Plan.make(config, load_plugins())
    plan.bank.make(plan.pairs)
    found: dict[str, list[float]] = {"in process": [], "1": [], "2": []}
    with tempfile.TemporaryDirectory() as place:
        for turn in range(ROUNDS):
            for name in found:
                folder = Path(place) / f"{turn}-{name}"
                with _crew(plan, name, folder) as crew:
                    found[name].append(rate(plan, crew, folder))
                print(turn, name, round(found[name][-1], 1), flush=True)
    pairs = zip(found["2"], found["1"], strict=True)
    ratio = statistics.median(two / one for two, one in pairs)
    told: dict[str, Any] = {
        "trials_a_minute": {n: [round(x, 2) for x in v] for n, v in found.items()},
        "ratio_of_two_to_one": round(ratio, 3),
        "date": str(date.today()),
        "python": sys.version.split()[0],
        "command": "python results/scale/workers.py",
    }
    print(json.dumps(told, indent=1))
    (Path(__file__).parent / "workers.json").write_text(
        json.dumps(told, indent=1) + "\n"
    )


def _crew(plan: Plan, name: str, folder: Path) -> Crew:
    if name == "in process":
        return LocalCrew(plan.evaluator())
    return ProcessCrew(Recipe.of(plan, 1), int(name), folder)


if __name__ == "__main__":
    main()
