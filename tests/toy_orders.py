"""Recipes and jobs for workers that load no model; see ``toy_jobs``."""

from dataclasses import dataclass
from typing import Any

from toy_jobs import PlainJob, PlainRecipe

from autoprune.searching import crew, recipe


class Recipe(recipe.Recipe):
    """A recipe without anything to cook; it reaches workers as less than it is."""

    def __reduce__(self) -> Any:
        return PlainRecipe, (self.fingerprint,)


def no_recipe(**fingerprint: Any) -> Recipe:
    """Make a recipe."""
    return Recipe({}, (), fingerprint, 1)


@dataclass(frozen=True, eq=False)
class Job(crew.Job):
    """Does one thing, and gives what it was told to give."""

    kind: str = "give"
    gives: Any = None

    def run(self, evaluator: Any) -> Any:
        return PlainJob(self.kind, self.gives).run(evaluator)

    def __reduce__(self) -> Any:
        return PlainJob, (self.kind, self.gives)
