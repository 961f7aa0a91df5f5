"""Which crew evaluates for a run: in this process, in others, or on a cluster."""

from pathlib import Path

from autoprune.searching.crew import Crew, LocalCrew
from autoprune.searching.memory_limit import share_of
from autoprune.searching.plan import Plan
from autoprune.searching.recipe import Recipe
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
    if asked.count is None:
        return LocalCrew(plan.evaluator())
    threads = asked.threads or threads_for(asked.count)
    limit = plan.config.search.memory
    memory = share_of(limit, asked.count) if limit is not None else None
    recipe = Recipe.of(plan, threads, memory)
    return ProcessCrew(recipe, asked.count, folder, time_limit=asked.time_limit)
