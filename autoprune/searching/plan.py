"""All that a run needs before its first trial, made from its configuration."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoprune.compression.actions import Actions
from autoprune.compression.bank import VariantBank
from autoprune.config import RunConfig
from autoprune.errors import ConfigError
from autoprune.evaluation.metric import Measured
from autoprune.evaluation.reward import Reward
from autoprune.evaluation.timed import notes_of, timed_by, with_latency
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import Plugins
from autoprune.policy import Action, Layer, Policy
from autoprune.searching.formulate import (
    DEFAULT_REWARD,
    SIZE,
    check_export,
    formulate,
    front_goals,
    make_objective,
    priced,
    read_actions,
    read_reward,
    refusal,
)
from autoprune.searching.objective import Direction, Objective
from autoprune.searching.prefilter import Filtered, cheap_scores, prefilter
from autoprune.searching.problem import Problem, Proposal
from autoprune.searching.proposer import Proposer
from autoprune.searching.rounds import narrowed
from autoprune.searching.rungs import rungs_of
from autoprune.searching.strategies import DEFAULTS, SamplerFactory, strategy_of
from autoprune.searching.trial import LocalEvaluator


@dataclass(frozen=True, eq=False)
class Plan:
    """A run, ready to begin.

    Attributes:
        config: What was asked for.
        plugins: What is installed.
        bench: Model, tokens and metrics.
        problem: What may be chosen, and the budgets.
        objective: What is wanted.
        reward: Makes one number of a measurement, with its weights.
        proposals: Policies to try first; uniform ones are the rivals.
        reference: Whose compressed model gives the inputs of the variants; None for
            the dense model.
        bank: The variants that trials use.
        filtered: What was left out before it was made; None if nothing was to be.
        incumbents: Around which this and earlier further rounds are.
    """

    config: RunConfig
    plugins: Plugins
    bench: Workbench
    problem: Problem
    objective: Objective
    reward: tuple[Reward, dict[str, float]]
    proposals: tuple[Proposal, ...]
    reference: Policy | None
    bank: VariantBank
    filtered: Filtered | None = None
    incumbents: tuple[Policy, ...] = ()

    @classmethod
    def make(
        cls, config: RunConfig, plugins: Plugins, cache: Path | None = None
    ) -> "Plan":
        """Load model and text, cross sites with actions, choose the reference.

        Raises:
            ConfigError: If the configuration is wrong or no policy meets the budgets.
            AutoPruneError: If model, text or a plugin fails.
        """
        # What needs no model to be refused is refused before one is loaded.
        check_export(plugins.get("exporters", config.export), fuse=config.fuse)
        plugins.get("samplers", config.search.sampler or DEFAULTS[0])
        plugins.get("rewards", config.objective.reward or DEFAULT_REWARD)
        for rule in config.space:
            read_actions(Actions(plugins.methods), rule)
        asked = dict.fromkeys(config.search.proposals)
        formulas: list[Proposer] = [plugins.get("formulas", name) for name in asked]
        bench = Workbench.open(
            plugins,
            model=config.model,
            task=config.task,
            text=config.text,
            target=config.export,
            seed=config.search.seed,
            fuse=config.fuse,
            tensor_parallel=config.tensor_parallel,
            cache=cache,
        )
        bench.store.cap_bytes = int(config.search.disk or bench.store.cap_bytes)
        if config.latency:
            backends = plugins.objects["latency_backends"]
            bench = with_latency(bench, config.latency, backends.values())
        reward = read_reward(config.objective, plugins, bench)
        problem = formulate(bench, config.space, config.objective.budgets)
        found = plugins.notify("propose_policies", problem=problem, bench=bench)
        proposals = tuple(proposal for several in found for proposal in several)
        reference = _reference(config, problem, proposals)
        for formula in formulas:
            proposals += tuple(formula.propose(problem, bench))
        filtered = _prefiltered(bench, problem, proposals) if config.prefilter else None
        problem = filtered.problem if filtered else problem
        plan = cls(
            config,
            plugins,
            bench,
            problem,
            make_objective(bench, config.objective),
            reward,
            proposals,
            reference,
            bench.bank(reference),
            filtered,
        )
        plan.check_store()
        strategy_of(config.search.sampler, plugins, plan.objective, problem)
        return plan

    @property
    def pairs(self) -> list[tuple[Layer, Action]]:
        """Every layer with every action that the space allows it."""
        return [
            (layer, action)
            for site in self.problem.space.sites
            for action in self.problem.space.choices[site.name]
            for layer in site.layers
        ]

    @property
    def strategy(self) -> SamplerFactory:
        """The strategy asked for, or the default for such an objective."""
        wanted = self.config.search.sampler
        return strategy_of(wanted, self.plugins, self.objective, self.problem)

    @property
    def notes(self) -> list[str]:
        """What a user should know before the search."""
        return [
            *self.bench.inventory.notes,
            *notes_of(self.bench, self.problem.space.sites),
        ]

    def around(self, incumbent: Policy) -> "Plan":
        """Make the plan of a further round.

        Args:
            incumbent: Whose compressed model gives the inputs of the new bank; its
                levels and those near them make the new space.

        Raises:
            ConfigError: If the new variants do not fit into the store.
        """
        bench, sites = self.bench, {s.name: s for s in self.problem.space.sites}

        def takes(site: str, action: Action) -> bool:
            layers = sites[site].layers
            return all(refusal(bench, layer, action) is None for layer in layers)

        space = narrowed(self.problem, incumbent, takes)
        plan = replace(
            self,
            problem=priced(bench, space, self.config.objective.budgets),
            proposals=(("incumbent", incumbent),),
            reference=incumbent,
            bank=bench.bank(incumbent),
            incumbents=(*self.incumbents, incumbent),
        )
        plan.check_store()
        return plan

    def evaluator(self, seed: int | None = None) -> LocalEvaluator:
        """Make what measures the trials, with the seed of the search or another."""
        return LocalEvaluator(
            self.bench,
            self.bank,
            self.problem.space,
            reward=self.reward,
            seed=self.config.search.seed if seed is None else seed,
        )

    @property
    def rungs(self) -> tuple[int, ...]:
        """Windows at which a trial may end; empty if it always sees the whole split."""
        total, length = self.bench.splits["fitness"].ids.shape
        tokens = self.config.search.rungs
        return rungs_of(tokens, length, total) if tokens else ()

    def check_store(self) -> None:
        """Refuse a space whose variants do not fit into the store.

        Raises:
            ConfigError: If they do not.
        """
        needed = sum(self.bench.actions.storage(*pair).nbytes for pair in self.pairs)
        cap = self.bench.store.cap_bytes
        if needed > cap:
            raise ConfigError(
                f"the variants of this space take {needed / 1e9:.1f} GB, the cap of "
                f"the store is {cap / 1e9:.1f} GB. Allow fewer actions, or more with "
                "search: {disk: ...} or AUTOPRUNE_STORE_GB"
            )

    def cost(self, split: str) -> Callable[[Measured], float]:
        """Say what finalists are compared by: less is better, inf if it diverged."""
        (name, direction), *others = self.objective.goals
        reward, weights = self.reward
        dense = self.bench.dense_metrics(split)

        def cost(measured: Measured) -> float:
            if others or name == "reward":
                value = -reward.score(measured.metrics, dense, weights)
            else:
                value = measured.metrics[name] * (1 if direction == "minimize" else -1)
            return value if math.isfinite(value) else math.inf

        return cost

    @property
    def front_goals(self) -> tuple[tuple[str, Direction], ...]:
        """The metrics of the front: the objective's, or size against divergence."""
        return front_goals(self.objective.goals)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that the run's figures depend on; a run folder keeps to one."""
        config, bench = self.config, self.bench
        return {
            "model": bench.checkpoint.revision,
            "task": config.task,
            "text": {name: split.fingerprint for name, split in bench.splits.items()},
            "space": self.problem.space.fingerprint,
            "bank": self.bank.name,
            "objective": config.objective.model_dump(mode="json"),
            "sampler": self.strategy.name,
            "rungs": list(self.rungs),
            "pruner": config.search.pruner if self.rungs else "none",
            "seed": config.search.seed,
            **config.search.asked,
            "export": config.export,
            **timed_by(bench),
            "compute_dtype": str(bench.compute_dtype).removeprefix("torch."),
            "methods": {name: m.version for name, m in _used(self).items()},
        }


def _prefiltered(
    bench: Workbench, problem: Problem, proposals: Sequence[Proposal]
) -> Filtered:
    """Leave dominated choices out, but for those of the policies to try first."""
    keep = {action for _, policy in proposals for action in policy.values()}
    scores = cheap_scores(bench.stitched, bench.actions, problem.space)
    return prefilter(problem, scores, keep=keep)


def _used(plan: Plan) -> Mapping[str, Any]:
    names = {step.method for _, action in plan.pairs for step in action.steps}
    return {name: plan.plugins.methods[name] for name in sorted(names)}


def _reference(
    config: RunConfig, problem: Problem, proposals: Sequence[Proposal]
) -> Policy | None:
    """Choose the proposal whose inputs the variants are made on.

    Under a budget the largest, the first of those within a percent; else the middle.
    """
    if config.bank == "dense":
        return None
    sized = [(problem.price(SIZE, policy), policy) for _, policy in proposals]
    if not problem.budgets:
        middle = sorted(sized, key=lambda pair: pair[0])[len(sized) // 2 :]
        return middle[0][1] if middle else None
    sized = [pair for pair in sized if problem.within(pair[1])]
    largest = max((size for size, _ in sized), default=0.0)
    return next((p for size, p in sized if size >= 0.99 * largest), None)
