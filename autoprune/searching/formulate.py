"""Makes the problem of a run from its configuration: space, prices, budgets, goals."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from autoprune.compression.actions import Actions
from autoprune.compression.structured import places
from autoprune.config import ObjectiveConfig, Rule
from autoprune.errors import (
    BudgetError,
    ConfigError,
    MethodError,
    PolicyError,
    unknown_name,
)
from autoprune.evaluation.metric import Evidence, Metric
from autoprune.evaluation.reward import Reward
from autoprune.evaluation.timed import latencies
from autoprune.evaluation.workbench import Workbench
from autoprune.exporting.exporter import Exporter
from autoprune.limits import Limit
from autoprune.plugins import Plugins
from autoprune.policy import Action, Layer, Policy
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.objective import Direction, Objective
from autoprune.searching.objective import Limit as Bound
from autoprune.searching.problem import Problem
from autoprune.searching.space import SearchSpace, build_space

DEFAULT_REWARD = "logs"
"""Decides where no metric and no budget is named, and picks from a Pareto front."""

LATENCY_WEIGHT = 0.2
"""Weight of the time of all workloads together in a reward: as much as size has."""

SIZE = "size_bytes"
"""The budget that is filled up; its prices are always known."""


def formulate(
    bench: Workbench, rules: Sequence[Rule], budgets: Mapping[str, Limit]
) -> Problem:
    """Cross the model's sites with the configured actions, and price every choice.

    Args:
        bench: The model and its export target.
        rules: Which actions which sites may choose from.
        budgets: Limits by metric; those that do not add up over layers are left to
            the trials.

    Raises:
        ConfigError: If an action, a site pattern or a metric is unknown or impossible.
        BudgetError: If no policy of the space meets a budget.
    """
    parsed = [(rule.sites, read_actions(bench.actions, rule)) for rule in rules]
    inventory = bench.inventory
    try:
        groups = inventory.groups_named({glob for glob, _ in parsed})
        sites = inventory.sites_for(groups)
    except PolicyError as error:
        raise ConfigError(f"space: {error}") from error
    kinds = {layer: site.kind for site in sites for layer in site.layers}
    space = build_space(sites, parsed, partial(_refusal_at, bench, kinds))
    return priced(bench, space, budgets)


def priced(
    bench: Workbench, space: SearchSpace, budgets: Mapping[str, Limit]
) -> Problem:
    """Price every choice of a space, and turn limits into budgets.

    Raises:
        ConfigError: If a metric is unknown, or limited relative to a dense value of 0.
        BudgetError: If no policy of the space meets a budget.
    """
    additive = {name for name in budgets if is_additive(bench, name)}
    names = sorted(additive | {SIZE}, key=lambda name: (name != SIZE, name))
    prices = {name: prices_in(bench, space, bench.metric(name)) for name in names}
    limits = [
        _budget(bench, space, prices[name], budgets[name])
        for name in names
        if name in budgets
    ]
    return Problem(space, tuple(prices.values()), tuple(limits))


def is_additive(bench: Workbench, name: str) -> bool:
    """Tell whether a metric adds up over layers, so that a budget on it is exact.

    Raises:
        ConfigError: If there is no metric of that name.
    """
    layer, storage = next(iter(bench.scene().dense_storages.items()))
    return bench.metric(name).price(layer, storage, bench.scene()) is not None


def read_actions(known: Actions, rule: Rule) -> tuple[Action, ...]:
    """Read the actions of a rule, checked, each once.

    Raises:
        ConfigError: If one is no action, or its method or a parameter is unknown or
            impossible.
    """
    try:
        parsed = [action for text in rule.actions for action in Action.parse_all(text)]
        return tuple(dict.fromkeys(known.canonical(a) for a in parsed))
    except (PolicyError, MethodError) as error:
        raise ConfigError(f"space, sites {rule.sites!r}: {error}") from error


def check_export(exporter: Exporter, *, fuse: bool) -> None:
    """Refuse a target that no search can have, before a model is loaded.

    Raises:
        ConfigError: If it stores no weights, or layers that it takes as one are to be
            searched one by one.
    """
    if not exporter.weights:
        raise ConfigError(
            f"export: the target {exporter.name!r} stores no weights, so there is no "
            "size to search by. Search for packed, and export the winner as "
            f"{exporter.name} with 'autoprune export RUN --target {exporter.name}'"
        )
    if exporter.fuses and not fuse:
        raise ConfigError(
            f"fuse: false lets layers of one site differ, but runtimes of the target "
            f"{exporter.name!r} take them as one. Set fuse: true, or search for packed"
        )


def refusal(bench: Workbench, layer: Layer, action: Action) -> str | None:
    """Say why a layer cannot take an action: its methods, then the export target."""
    reason = bench.actions.refuses(layer, action)
    if reason is None:
        storage = bench.actions.storage(layer, action)
        reason = bench.exporter.refuses(layer, storage)
    return reason


def _refusal_at(
    bench: Workbench, kinds: Mapping[Layer, str], layer: Layer, action: Action
) -> str | None:
    """Also say why a method that acts on whole sites cannot act on a part of one."""
    for step in action.steps:
        method = bench.actions.method(step)
        if method.kinds and kinds[layer] not in method.kinds:
            return f"{method.name} acts on whole sites. {places(method)}"
    return refusal(bench, layer, action)


def prices_in(bench: Workbench, space: SearchSpace, metric: Metric) -> Prices:
    """Price every choice of a space in one additive metric."""
    scene = bench.scene()
    table = {}
    for site in space.sites:
        totals = []
        for action in space.choices[site.name]:
            storages = [(la, bench.actions.storage(la, action)) for la in site.layers]
            priced = [metric.price(la, storage, scene) for la, storage in storages]
            totals.append(sum(price for price in priced if price is not None))
        table[site.name] = np.array(totals, dtype=np.float64)
    return Prices(metric.name, table)


def _budget(
    bench: Workbench, space: SearchSpace, prices: Prices, limit: Limit
) -> Budget:
    """Turn a limit on a metric into one on its sum of prices."""
    metric, scene = bench.metric(prices.metric), bench.scene()
    dense = metric.measure(Evidence(scene, scene.dense_storages))
    if limit.relative and dense == 0:
        raise ConfigError(
            f"the budget of {metric.name} is {limit}, but the dense model's "
            f"{metric.name} is 0; give an absolute limit"
        )
    value = limit.absolute(dense)
    total = metric.total_limit(value, scene)
    cheapest = {name: int(costs.argmin()) for name, costs in prices.table.items()}
    lowest = sum(costs[cheapest[name]] for name, costs in prices.table.items())
    if lowest > total:
        policy = Policy({n: space.choices[n][i] for n, i in cheapest.items()})
        reach = metric.measure(Evidence(scene, bench.storages(policy)))
        relation = "<=" if metric.direction == "minimize" else ">="
        raise BudgetError(
            f"no policy of the space meets the budget {metric.name} {relation} "
            f"{value:.6g}; the best that its actions reach is {reach:.6g} (dense: "
            f"{dense:.6g}). Relax the budget, or allow stronger actions"
        )
    return Budget(metric.name, total)


def make_objective(bench: Workbench, wanted: ObjectiveConfig) -> Objective:
    """Say what the search is after, and what bounds it that only a trial can tell.

    Raises:
        ConfigError: If a metric is unknown, or limited relative to a dense value of 0.
    """
    limits = []
    for name, limit in wanted.budgets.items():
        if is_additive(bench, name):
            continue  # kept exactly by every proposal
        dense = bench.dense_metrics("fitness")[name]
        if limit.relative and dense == 0:
            raise ConfigError(
                f"the budget of {name} is {limit}, but the dense model's {name} is 0; "
                "give an absolute limit"
            )
        direction = bench.metric(name).direction
        limits.append(Bound(name, limit.absolute(dense), direction))
    directions = {name: metric.direction for name, metric in bench.metrics.items()}
    return Objective(goals_of(directions, wanted), tuple(limits))


def read_reward(
    wanted: ObjectiveConfig, plugins: Plugins, bench: Workbench
) -> tuple[Reward, dict[str, float]]:
    """Look up the reward and its weights; time that is predicted weighs by default.

    Raises:
        ConfigError: If a weight names no metric that can be a term.
    """
    reward: Reward = plugins.get("rewards", wanted.reward or DEFAULT_REWARD)
    weights = dict(wanted.weights or reward.default_weights)
    if not wanted.weights:
        timed = [metric.name for metric in latencies(bench)]
        weights |= {name: LATENCY_WEIGHT / len(timed) for name in timed}
    if wanted.reward:
        # Scoring the dense model tells of a wrong weight before any trial.
        dense = bench.dense_metrics("fitness")
        reward.score(dense, dense, weights)
    return reward, weights


def goals_of(
    directions: Mapping[str, Direction], wanted: ObjectiveConfig
) -> tuple[tuple[str, Direction], ...]:
    """Name the metrics that a search is after, each with its direction.

    Without a metric, a front or a reward, it is the least KL if anything is limited;
    with no limits at all, the reward decides.

    Raises:
        ConfigError: If a metric is unknown.
    """
    if wanted.reward or not (wanted.metric or wanted.pareto or wanted.budgets):
        return (("reward", "maximize"),)
    names = wanted.pareto or [wanted.metric or "kl"]
    for name in names:
        if name not in directions:
            raise ConfigError(unknown_name("metric", name, directions))
    return tuple((name, directions[name]) for name in names)


def front_goals(
    goals: tuple[tuple[str, Direction], ...],
) -> tuple[tuple[str, Direction], ...]:
    """Name the metrics of the front: those wanted, or size against divergence."""
    return goals if len(goals) > 1 else ((SIZE, "minimize"), ("kl", "minimize"))
