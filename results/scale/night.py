"""How exactly a time budget is kept, and where the time of the end goes.

    python results/scale/night.py [--budget 30min] [--space quick] [--workers N]

A real search and its verified export on SmolLM2-135M. ``reserved_s`` is what was left
when the last trial had ended: the run's own estimate of what comes after. Beside it
stands what each stage of the end then took. One thread.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from autoprune.config import RunConfig  # noqa: E402
from autoprune.limits import parse_duration  # noqa: E402
from autoprune.reporting.observer import Observer  # noqa: E402
from autoprune.run import find_space, search  # noqa: E402

RESULT = Path(__file__).parent / "night.json"


class Watch(Observer):
    """Takes the time of every stage."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []

    def stage(self, name: str) -> None:
        """Note when a stage begins."""
        self.stages.append((name, time.monotonic()))
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {name}\n")

    def note(self, text: str) -> None:
        """Show what a user is told."""
        sys.stderr.write(f"         {text}\n")


def main() -> None:
    """Search, print, and write ``night.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="30min")
    parser.add_argument("--space", default="quick")
    asked = parser.parse_args()
    budget, watch = parse_duration(asked.budget), Watch()
    config = RunConfig.from_yaml(find_space(asked.space))
    timed = {"budget": budget, "trials": None}
    search_config = config.search.model_copy(update=timed)
    config = config.model_copy(update={"search": search_config})
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = search(config, folder, observer=watch, export=True)
        took = time.monotonic() - began
    names, times = zip(*watch.stages, strict=True)
    ends = [*times[1:], began + took]
    last = next(n for n, name in enumerate(names) if name.startswith("choosing"))
    found = {
        "budget_s": budget,
        "took_s": round(took, 1),
        "share": round(took / budget, 3),
        "trials": len(result.trials),
        "ended": result.ended,
        "verified": all(report.verified for report in result.exports),
        "perplexity": result.finals["winner"]["report"]["perplexity"],
        "reserved_s": round(began + budget - times[last], 1),
        "end_s": {
            name: round(end - start, 1)
            for name, start, end in list(zip(names, times, ends, strict=True))[last:]
        },
        "space": asked.space,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread",
        "load": round(os.getloadavg()[2], 1),
        "date": date.today().isoformat(),
        "command": " ".join(["python", "results/scale/night.py", *sys.argv[1:]]),
    }
    print(json.dumps(found, indent=1))
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
