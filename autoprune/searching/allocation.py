"""The exact optimum of an additive score under budgets, and its whole Pareto front.

Costs and prices are ``[sites, choices]``, infinite where there is no choice.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from autoprune.errors import BudgetError, ConfigError
from autoprune.searching.budget import Budget, Prices, prices_of
from autoprune.searching.knapsack import minimise
from autoprune.searching.problem import Problem
from autoprune.searching.relaxation import Program, Steps, sweep
from autoprune.searching.space import SearchSpace


class FrontPoint(NamedTuple):
    """A policy that nothing of a lower price undercuts in cost."""

    price: float
    cost: float
    indices: Int[np.ndarray, " sites"]


def allocate(
    problem: Problem,
    costs: Float[np.ndarray, "sites choices"],
    *,
    budgets: Sequence[Budget] | None = None,
    now: Int[np.ndarray, " sites"] | None = None,
    changes: int | None = None,
    levels: int | None = None,
) -> Int[np.ndarray, " sites"]:
    """Choose for every site so that the sum of costs is least within the budgets.

    One binary variable a (site, choice), as ModelOpt's ``auto_quantize`` and Puzzle
    have it; unlike theirs, under any number of budgets and in a trust region.

    Args:
        problem: The space, the prices, and the budgets where no others are given.
        costs: What each choice adds to the score, of any sign; inf where not allowed.
        budgets: Instead of the problem's.
        now: A policy to stay near to, with ``changes`` or ``levels``.
        changes: At most so many sites may differ from ``now``.
        levels: At most so many steps of the first budget's price away from ``now`` at
            each site; choices of one price are one step.

    Returns:
        The position of each site's choice, within every budget to the last bit. The
        least cost; where several budgets bind, so that too many partial solutions
        compete, at most 1e-4 of the sum of absolute costs above it.

    Raises:
        ConfigError: If the costs do not fit the space, a budget's metric has no price,
            or a trust region has no ``now``.
        BudgetError: If no choice is within the budgets.
    """
    space = problem.space
    limits = problem.budgets if budgets is None else tuple(budgets)
    if now is None and (changes is not None or levels is not None):
        raise ConfigError(
            "changes and levels are counted from a policy; give it as now"
        )
    named = [prices_of(budget.metric, problem.prices) for budget in limits]
    tables = [entry.padded(space) for entry in named]
    allowed = _allowed(space, costs)
    if now is not None and levels is not None:
        allowed &= _near(_first(limits, tables, "levels"), now, levels)
        _check_sites(space, allowed)
    rows, most = list(tables), [b.limit for b in limits]
    constants = [entry.constant for entry in named]
    if now is not None and changes is not None:
        rows.append((np.arange(allowed.shape[1]) != now[:, None]).astype(np.float64))
        most.append(float(changes))
        constants.append(0.0)
    program = Program.of(np.where(allowed, costs, np.inf), rows, most, constants)
    _check_each(program, limits, now=now, changes=changes, levels=levels)
    found = minimise(program)
    if found is None:
        raise BudgetError(_at_once(program, limits, changes))
    return found


def front(
    problem: Problem,
    costs: Float[np.ndarray, "sites choices"],
    metric: str,
    *,
    count: int | None = None,
) -> list[FrontPoint]:
    """Give the Pareto front of an additive score against a price, in one sweep.

    From the cheapest policy on, the step that saves most cost for its price is taken:
    so each point is the optimum of its own price, as ``allocate`` would find it. Only
    points on the convex hull of the front are met; between two neighbours lies less
    than what one site's step is worth. Budgets of the problem play no part.

    Args:
        problem: The space and the prices.
        costs: What each choice adds to the score; inf where not allowed.
        metric: The priced metric.
        count: At most so many points, at least two, spread evenly over the price, the
            ends among them; all if None.

    Returns:
        Points of rising price and falling cost.

    Raises:
        ConfigError: If the costs do not fit the space or the metric has no price.
    """
    if count is not None and count < 2:
        raise ConfigError(f"a front has at least its two ends, found count={count}")
    prices = prices_of(metric, problem.prices)
    table = prices.padded(problem.space)
    allowed = _allowed(problem.space, costs)
    steps = sweep(np.where(allowed, costs, np.inf), table)
    # A step to another policy of the same slope is on the hull's edge, and optimal too.
    ends = prices.constant + np.concatenate([[0.0], np.cumsum(steps.price)])
    kept = np.arange(len(ends))
    if count is not None and len(ends) > count:
        even = np.linspace(ends[0], ends[-1], count)
        kept = np.unique(np.abs(ends[:, None] - even).argmin(axis=0))
    return _points(steps, kept, prices=prices, table=table, costs=costs)


def _points(
    steps: Steps,
    kept: NDArray[np.int64],
    *,
    prices: Prices,
    table: NDArray[np.float64],
    costs: NDArray[np.float64],
) -> list[FrontPoint]:
    """Take the steps in turn, and write down where those to be kept lead."""
    current, taken, points = steps.start.copy(), 0, []
    rows = np.arange(len(current))
    for end in kept:
        # Of several steps at one site the last one counts, as numpy assigns in order.
        current[steps.site[taken:end]] = steps.choice[taken:end]
        taken = int(end)
        price = prices.constant + float(table[rows, current].sum())
        cost = float(costs[rows, current].sum())
        points.append(FrontPoint(price, cost, current.copy()))
    return points


def _allowed(
    space: SearchSpace, costs: Float[np.ndarray, "sites choices"]
) -> NDArray[np.bool_]:
    """Tell which choices exist and have a cost."""
    counts = np.array([len(space.choices[site.name]) for site in space.sites])
    shape = (len(counts), int(counts.max()))
    if costs.shape != shape or np.isnan(costs).any() or (costs == -np.inf).any():
        raise ConfigError(
            f"costs must be numbers, or inf where a choice is not allowed, for {shape} "
            f"sites and choices; found shape {costs.shape} with "
            f"{int(np.isnan(costs).sum() + (costs == -np.inf).sum())} others"
        )
    allowed: NDArray[np.bool_] = np.isfinite(costs)
    allowed &= np.arange(shape[1]) < counts[:, None]
    _check_sites(space, allowed)
    return allowed


def _check_sites(space: SearchSpace, allowed: NDArray[np.bool_]) -> None:
    closed = np.flatnonzero(~allowed.any(axis=1))
    if len(closed):
        raise BudgetError(
            f"{len(closed)} of {len(allowed)} sites have no allowed choice, the first "
            f"is {space.sites[closed[0]].name!r}. Give one of its choices a finite "
            "cost, or allow more levels."
        )


def _first(
    budgets: Sequence[Budget], tables: Sequence[NDArray[np.float64]], what: str
) -> NDArray[np.float64]:
    if not budgets:
        raise ConfigError(f"{what} are steps of the first budget's price, found none")
    return tables[0]


def _near(
    prices: NDArray[np.float64], now: NDArray[np.int64], levels: int
) -> NDArray[np.bool_]:
    """Tell which choices are few steps of price away, all of one price being one."""
    order = np.argsort(prices, axis=1, kind="stable")
    ranked = np.take_along_axis(prices, order, axis=1)
    # Padding is infinite, and infinity less itself is not a number.
    rises = ranked[:, 1:] > ranked[:, :-1]
    steps = np.zeros(prices.shape, dtype=np.int64)
    np.put_along_axis(steps[:, :], order[:, 1:], np.cumsum(rises, axis=1), axis=1)
    here = np.take_along_axis(steps, now[:, None], axis=1)
    near: NDArray[np.bool_] = np.abs(steps - here) <= levels
    return near


def _check_each(
    program: Program,
    budgets: Sequence[Budget],
    *,
    now: NDArray[np.int64] | None,
    changes: int | None,
    levels: int | None,
) -> None:
    """Refuse a budget that no allowed choice meets, whatever the others say."""
    lowest = program.lowest()
    if changes is not None and lowest[-1] > changes:
        raise BudgetError(
            f"{lowest[-1]:.0f} sites must leave their choice of now, which is not "
            f"allowed; {changes} changes do not suffice"
        )
    if now is not None and changes is not None:
        lowest = program.lowest_near(now, changes)
    parts = [
        f"{changes} changes" if changes is not None else "",
        f"{levels} levels" if levels is not None else "",
    ]
    region = " and ".join(part for part in parts if part)
    who = f"no policy within {region} of now" if region else "no policy of the space"
    remedy = "allow a larger step" if region else "allow actions that cost less"
    for budget, reach in zip(budgets, lowest, strict=False):
        if reach > budget.limit:
            raise BudgetError(
                f"{who} has {budget.metric} <= {_number(budget.limit)}; the cheapest "
                f"has {_number(reach)}. Raise the budget or {remedy}."
            )


def _at_once(program: Program, budgets: Sequence[Budget], changes: int | None) -> str:
    named = " and ".join(f"{b.metric} <= {_number(b.limit)}" for b in budgets)
    each = ", ".join(_number(reach) for reach in program.lowest()[: len(budgets)])
    far = "" if changes is None else f" within {changes} changes"
    return (
        f"no policy of the space has {named} at once{far}; each alone can be met, from "
        f"{each}. Raise one."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.6g}"
