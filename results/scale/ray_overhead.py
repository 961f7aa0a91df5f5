"""What it costs to hand a trial to a worker, on every engine, and how many keep up.

    python results/scale/ray_overhead.py [--trials 100] [--workers 64]

Overhead is the wall time of a trial whose evaluator gives a number at once: the whole
way, from the strategy that asks (``random``, 30 sites) to the row in the ledger. The
rate is that of workers whose trials sleep 2 s, against a trial a worker every 2 s.
All without a model, so that what is measured is ours and the engines' alone. What each
engine costs before its first trial, and when it ends, stands beside.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import optuna  # noqa: E402
from toy_jobs import Instant, Light  # noqa: E402
from toy_orders import Job, no_recipe  # noqa: E402

from autoprune.policy import Action, Layer, Policy, Site  # noqa: E402
from autoprune.search_config import WorkersConfig  # noqa: E402
from autoprune.searching import workers  # noqa: E402
from autoprune.searching.crew import Crew, LocalCrew  # noqa: E402
from autoprune.searching.ends import Ends  # noqa: E402
from autoprune.searching.ledger import Ledger  # noqa: E402
from autoprune.searching.objective import Objective  # noqa: E402
from autoprune.searching.problem import Problem  # noqa: E402
from autoprune.searching.ray_cluster import Cluster  # noqa: E402
from autoprune.searching.ray_engine import RayCrew  # noqa: E402
from autoprune.searching.ray_tune import TunedCrew  # noqa: E402
from autoprune.searching.slopes import SiteSlopes  # noqa: E402
from autoprune.searching.space import SearchSpace  # noqa: E402
from autoprune.searching.strategies import SamplerFactory  # noqa: E402
from autoprune.searching.study import run_study  # noqa: E402
from autoprune.searching.trial import Evaluator, Score  # noqa: E402

SLEEP_S = 2.0
SITES = 30
RESULT = Path(__file__).parent / "ray.json"
RANDOM = SamplerFactory(
    "random", lambda brief: optuna.samplers.RandomSampler(seed=brief.seed)
)


class Here(Evaluator):
    """The same as ``Instant``, for this process."""

    def measure(
        self, policy: Policy, windows: int | None = None, *, near: Policy | None = None
    ) -> Score:
        """Give a number."""
        found: Score = Instant().measure(policy)
        return found

    def slopes(self, policy: Policy, **asked: Any) -> SiteSlopes:
        """Refuse."""
        raise AssertionError("random search asks for no slopes")


def make_problem() -> Problem:
    """Make a space of 30 sites with four choices, and no budget."""
    places = []
    for block in range(SITES):
        name = f"layers.{block}.up_proj"
        layer = Layer(name, (8, 16), "float32", block, "up_proj", f"in.{block}")
        places.append(Site(f"blocks.{block}.up", (layer,)))
    actions = tuple(Action.parse(f"rtn(bits={bits})") for bits in (2, 3, 4, 8))
    return Problem(SearchSpace(tuple(places), {site.name: actions for site in places}))


def trial_ms(crew: Crew, trials: int) -> float:
    """Give the mean wall time of a trial, in ms, once the workers are ready."""
    problem, starts = make_problem(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        Ledger.open(Path(folder), {"space": "toy"}) as ledger,
    ):
        run_study(
            problem,
            crew,
            ledger=ledger,
            sampler=RANDOM,
            objective=Objective((("kl", "minimize"),)),
            seed=0,
            ends=Ends(trials=trials),
            on_trial=lambda trial: starts.append(time.perf_counter()),
        )
    warm = trials // 10
    return 1000 * (starts[-1] - starts[warm]) / (trials - warm - 1)


def rate(crew: Crew, size: int, rounds: int) -> dict[str, float]:
    """Have workers sleep; give their rate, as a share of the ideal one."""
    began = time.perf_counter()
    while len(crew.idle()) < size:
        crew.wait(1.0)
    ready, left, done = time.perf_counter(), size * rounds, 0
    wanted = left
    while done < wanted:
        for worker in crew.idle():
            if left:
                crew.submit(worker, Job("sleep", SLEEP_S))
                left -= 1
        done += len(crew.wait(1.0))
    seconds = time.perf_counter() - ready
    return {
        "start_s": round(ready - began, 1),
        "share_of_ideal": round(wanted * SLEEP_S / size / seconds, 3),
    }


def processes(size: int, folder: Path) -> Crew:
    """Make workers of this machine that load nothing."""
    workers._START = "from toy_jobs import serve; serve()"
    return workers.ProcessCrew(no_recipe(), size, folder)


def on_ray(size: int, evaluator: Any, cluster: Cluster, cpus: float) -> RayCrew:
    """Make actors that load nothing."""
    return RayCrew(no_recipe(), cluster, count=size, cpus=cpus, evaluator=evaluator)


def tuned(size: int, cluster: Cluster, folder: Path) -> TunedCrew:
    """Make trials of Tune that load nothing."""
    asked = WorkersConfig(engine="ray-tune", count=size)
    return TunedCrew(
        no_recipe(),
        cluster,
        folder,
        asked=asked,
        cpus=1,
        beside=0,
        evaluator=Instant,
    )


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    """Make something; give it with the seconds that took."""
    began = time.perf_counter()
    return make(), round(time.perf_counter() - began, 1)


def main() -> None:
    """Measure, print, and write ``ray.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    found["overhead_ms"] = overhead = {}
    overhead["this process"] = trial_ms(LocalCrew(Here()), asked.trials)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with processes(1, folder) as crew:
            overhead["process"] = trial_ms(crew, asked.trials)
        with processes(asked.workers, folder) as crew:
            found["rate of processes"] = rate(crew, asked.workers, asked.rounds)
        cluster, found["start_of_cluster_s"] = timed(lambda: Cluster.open(None, cpus=2))
        with on_ray(1, Instant, cluster, 1) as crew:
            overhead["ray"] = trial_ms(crew, asked.trials)
        cluster = Cluster.open(None, cpus=2)
        with tuned(1, cluster, folder) as crew:
            overhead["ray-tune"] = trial_ms(crew, asked.trials)
        cluster = Cluster.open(None, cpus=2)
        with on_ray(asked.workers, Light, cluster, 2 / asked.workers) as crew:
            found["rate of ray"] = rate(crew, asked.workers, asked.rounds)
            _, found["end_of_cluster_s"] = timed(crew.close)
    found["overhead_ms"] = {name: round(ms, 1) for name, ms in overhead.items()}
    found |= {
        "sleep_s": SLEEP_S,
        "workers": asked.workers,
        "trials": asked.trials,
        "command": " ".join(["python", "results/scale/ray_overhead.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "ray": version("ray"),
        "optuna": version("optuna"),
    }
    print(json.dumps(found, indent=1))
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
