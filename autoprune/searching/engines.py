"""Which crew evaluates for a run: in this process, in others, or on a cluster."""

import os
from dataclasses import replace
from pathlib import Path

from autoprune.errors import RunError
from autoprune.search_config import WorkersConfig
from autoprune.searching.crew import Crew, LocalCrew
from autoprune.searching.memory_limit import share_of
from autoprune.searching.plan import Plan
from autoprune.searching.recipe import Recipe
from autoprune.searching.store_mark import StoreMark
from autoprune.searching.workers import ProcessCrew, threads_for


def open_crew(plan: Plan, folder: Path) -> Crew:
    """Gather the workers that a run asks for.

    Args:
        plan: Of the first round.
        folder: The run folder.

    Raises:
        RunError: If workers cannot be had.
    """
    asked = plan.config.workers
    if asked.engine != "process":
        return _on_ray(plan, folder)
    if asked.count is None:
        return LocalCrew(plan.evaluator())
    recipe = Recipe.of(plan, _threads(asked), _memory(plan, asked.count))
    return ProcessCrew(recipe, asked.count, folder, time_limit=asked.time_limit)


def _threads(asked: WorkersConfig) -> int:
    """Tell the threads of each worker: those asked for, or a share of this machine."""
    if asked.threads:
        return asked.threads
    if asked.count and not asked.address:
        return threads_for(asked.count)
    return max(1, int(asked.cpus or 1))


def _memory(plan: Plan, count: int) -> int | None:
    """Tell the memory of each worker on this machine; None for no limit."""
    limit = plan.config.search.memory
    return None if limit is None else share_of(limit, count)


def _on_ray(plan: Plan, folder: Path) -> Crew:
    """Gather evaluators on a Ray cluster."""
    try:
        from autoprune.searching.ray_cluster import Cluster
        from autoprune.searching.ray_engine import RayCrew
        from autoprune.searching.ray_tune import TunedCrew
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("autoprune"):
            raise
        raise RunError(
            f"engine {plan.config.workers.engine} needs Ray, and there is none "
            f"({error}). Install it: pip install 'autoprune[ray]'"
        ) from error
    asked, threads = plan.config.workers, _threads(plan.config.workers)
    cpus = float(asked.cpus or threads)
    tuned = asked.engine == "ray-tune"
    # Slopes are taken beside the trials of Tune, by an evaluator of their own.
    beside = int(tuned and "slopes" in plan.strategy.needs)
    here = asked.count or max(1, int(len(os.sched_getaffinity(0)) / cpus))
    memory = None if asked.address else _memory(plan, here + beside)
    mark = StoreMark.make(plan.bench.store.folder)
    recipe = replace(Recipe.of(plan, threads, memory), mark=mark)
    cluster = Cluster.open(asked.address, cpus=cpus * ((asked.count or 1) + beside))
    cluster.at_close(mark.remove)
    try:
        if tuned:
            return TunedCrew(
                recipe, cluster, folder, asked=asked, cpus=cpus, beside=beside
            )
        return RayCrew(
            recipe,
            cluster,
            count=asked.count,
            cpus=cpus,
            gpus=asked.gpus,
            time_limit=asked.time_limit,
        )
    except BaseException:
        cluster.close()
        raise
