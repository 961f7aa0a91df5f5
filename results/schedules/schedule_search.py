"""A search over schedules on SmolLM2-135M, at a third of what the table of them cost.

    python results/schedules/schedule_search.py [--seed 0]

Wanda at 2:4 in all blocks and the same text as in the cells ``recovery-24-*`` of
``recovery.py``. The budget is a third of the CPU seconds of all those cells, by a clock
of CPU time, for everything: loading, pruning, trainings, the last choice and the
report. The space does not hold the table's best row. All goes to
``schedule_search.json``.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from recording import tell  # noqa: E402
from recovery import ACTIONS, RECORDS, RECOVERIES, text_config  # noqa: E402

from autoprune.config import RunConfig  # noqa: E402
from autoprune.reporting.observer import Observer  # noqa: E402
from autoprune.run import search  # noqa: E402
from autoprune.searching.clock import Clock  # noqa: E402
from autoprune.searching.ledger import Ledger  # noqa: E402
from autoprune.searching.recovering import PART  # noqa: E402

COURSES = [
    "one-shot + blockwise(tokens=[8192, 12288], learning_rate=[0.0005, 0.001])",
    "one-shot + finetune(tokens=12288, batch=1, learning_rate=[0.0001, 0.0003])",
    "one-shot + distill(tokens=12288, batch=1, learning_rate=[0.0001, 0.0003])",
    "one-shot + lora(tokens=12288, batch=1, learning_rate=[0.0003, 0.001])",
    "one-shot + blockwise(tokens=8192) + distill(tokens=[4096, 8192], batch=1)",
    "iterative(rounds=2) + blockwise(tokens=[8192, 12288])",
]


@dataclass(frozen=True)
class CpuClock(Clock):
    """Seconds of CPU time of this process."""

    def now(self) -> float:
        """Give them."""
        return time.process_time()


class Telling(Observer):
    """Tells what is done."""

    def stage(self, name: str) -> None:
        """Tell a stage."""
        tell(name)

    def note(self, text: str) -> None:
        """Tell a note."""
        tell(text)


def main() -> None:
    """Search, compare, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    table = RECORDS.read("recovery-24-*")
    assert len(table) == len(RECOVERIES), "measure the table first: recovery.py"
    best = min(table.values(), key=lambda row: row["perplexity"])
    budget = sum(row["cpu_s"] for row in table.values()) / 3
    courses = [text for text in COURSES if best["schedule"] not in text]
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.from_dict(space(courses, budget, seed))
        result = search(config, folder, observer=Telling(), clock=CpuClock())
        with Ledger.read(Path(folder) / PART) as ledger:
            trials = ledger.trials()
    report = result.finals["winner"]["report"]
    found = {
        "budget_cpu_s": round(budget, 1),
        "cpu_s": round(time.process_time() - began, 1),
        "table_cpu_s": round(3 * budget, 1),
        "winner": {"schedule": result.policy.schedule, **figures(report)},
        "best_row": {"schedule": best["schedule"], **figures(best)},
        "kl_standard_error": result.finals["winner"]["kl_standard_error"],
        "nats_over_best_row": math.log(report["perplexity"] / best["perplexity"]),
        "trials": [
            {
                "schedule": trial.policy.schedule,
                "state": trial.state,
                "kl": trial.metrics.get("kl"),
                "tokens": trial.metrics.get("training_tokens"),
            }
            for trial in trials
        ],
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
    }
    text = json.dumps(found, indent=1)
    (HERE / "schedule_search.json").write_text(text + "\n")
    print(text)


def figures(row: dict[str, Any]) -> dict[str, float]:
    """Take what is compared."""
    return {name: row[name] for name in ("perplexity", "kl")}


def space(courses: list[str], budget: float, seed: int) -> dict[str, Any]:
    """Give the configuration: one policy, and all courses."""
    return {
        "text": text_config().model_dump(),
        "space": [
            {"actions": [ACTIONS["24"]]},
            {"sites": "embedding", "actions": ["dense"]},
        ],
        "objective": {"metric": "kl"},
        "search": {
            "sampler": "random",
            "trials": 1,
            "budget": budget,
            "rivals": [],
            "refine": "none",
            "finalists": 1,
            "seed": seed,
        },
        "recovery": {"schedules": courses, "short": 0.25, "share": 0.8},
    }


if __name__ == "__main__":
    main()
