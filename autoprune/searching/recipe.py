"""What a worker is told, as plain data: from it, it makes its evaluator by itself."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from autoprune.config import RunConfig
from autoprune.errors import RunError
from autoprune.plugins import Plugins, load_plugins
from autoprune.policy import Policy
from autoprune.searching.fingerprint import differences
from autoprune.searching.plan import Plan
from autoprune.searching.store_mark import StoreMark
from autoprune.searching.trial import LocalEvaluator

PACKAGES = ("autoprune", "torch", "transformers", "numpy")
"""Those whose versions decide figures."""

_DECIDES = (
    "model",
    "task",
    "text",
    "space",
    "bank",
    "export",
    "latency",
    "compute_dtype",
    "methods",
)
"""Parts of a run's fingerprint that decide what a policy scores."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """A part of a run, for whoever evaluates for it.

    Attributes:
        config: The run's configuration, as its JSON.
        incumbents: Around which further rounds are, one a round, as their JSON.
        fingerprint: What decides what a policy scores, as the driver has it.
        threads: Of each worker.
        memory: Bytes of data that each may hold; None for no limit.
        mark: By which a worker knows that it sees the driver's store; None where there
            is no other.
    """

    config: Mapping[str, Any]
    incumbents: tuple[Mapping[str, Any], ...]
    fingerprint: Mapping[str, Any]
    threads: int
    memory: int | None = None
    mark: StoreMark | None = None

    @classmethod
    def of(cls, plan: Plan, threads: int, memory: int | None = None) -> "Recipe":
        """Describe a plan."""
        incumbents = tuple(policy.to_dict() for policy in plan.incumbents)
        config = plan.config.model_dump(mode="json")
        return cls(config, incumbents, fingerprint_of(plan), threads, memory)

    def around(self, plan: Plan) -> "Recipe":
        """Describe another part of the same run."""
        return replace(Recipe.of(plan, self.threads, self.memory), mark=self.mark)

    def put_mark(self) -> None:
        """Have the mark where workers look for it; called before one of them may.

        Raises:
            StoreError: If it cannot be written.
        """
        if self.mark is not None:
            self.mark.put()


def fingerprint_of(plan: Plan) -> dict[str, Any]:
    """Give all that decides what a policy scores: of the run, and of who evaluates."""
    whole = plan.fingerprint
    return {
        **{key: whole[key] for key in _DECIDES if key in whole},
        "python": platform.python_version().rpartition(".")[0],
        "packages": {name: version(name) for name in PACKAGES},
        "plugins": _plugins(plan.plugins),
    }


class Kitchen:
    """Makes evaluators after recipes; the model stays loaded from one to the next."""

    def __init__(self) -> None:
        self._first: Plan | None = None

    def make(self, recipe: Recipe) -> LocalEvaluator:
        """Make what evaluates for a part of a run.

        Raises:
            RunError: If figures of this worker would not be those of the driver: its
                model, text, plugins or versions differ; or it does not see its store.
            AutoPruneError: If model, text or a plugin cannot be loaded.
        """
        if self._first is None:
            config = RunConfig.from_dict(dict(recipe.config), "the run's configuration")
            self._first = Plan.make(config, load_plugins(config.plugins))
            if config.workers.count != 1:  # others on this machine map the same files
                self._first.bench.store.share_weights()
        plan = self._first
        if recipe.mark is not None:
            recipe.mark.check(plan.bench.store.folder)
        for incumbent in recipe.incumbents:
            plan = plan.around(Policy.from_dict(incumbent))
        if lines := differences(recipe.fingerprint, fingerprint_of(plan)):
            raise RunError(
                f"the worker on {platform.node()} differs from the driver, so that its "
                "figures would not be the run's:\n  "
                + "\n  ".join(lines)
                + "\nInstall there what is installed here, and start again."
            )
        evaluator = plan.evaluator()
        plan.bench.teacher(evaluator.SPLIT)  # what every trial is held against
        return evaluator


def _plugins(plugins: Plugins) -> dict[str, str]:
    """Tell the version of every plugin that came with another package than ours."""
    return {
        record.module: record.distribution
        for record in plugins.records
        if not record.error
    }
