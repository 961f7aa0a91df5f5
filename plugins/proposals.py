"""The plain rivals: one action at every site, and mixes of two that meet a budget."""

from collections.abc import Iterator
from itertools import pairwise

from autoprune.errors import BudgetError
from autoprune.hookspecs import hookimpl
from autoprune.policy import DENSE, Action, Policy, Value, format_value
from autoprune.searching.problem import Problem

OFFERED = 0.8
"""Share of the sites with a choice that must offer an action to make it a rival."""

Family = tuple[tuple[str, tuple[str, ...]], ...]
"""Methods of an action's steps, each with the names of its parameters."""


@hookimpl
def propose_policies(problem: Problem) -> list[tuple[str, Policy]]:
    """Propose uniform policies, and in each family the mix that meets the budgets.

    A family's levels differ in the values of parameters only. Where the first budget
    lies between two of them, sites drawn at random take the dearer one: so each family
    has a rival of just the size that the search may use.
    """
    uniform = {action: _uniform(problem, action) for action in _common(problem)}
    proposals = [
        (f"uniform {action}", policy)
        for action, policy in uniform.items()
        if problem.within(policy)
    ]
    for low, high in _straddling(problem, uniform):
        try:
            mix = problem.between(uniform[low], uniform[high])
        except BudgetError:  # another budget than the first is the tighter one
            continue
        proposals.append((f"uniform {_range(low, high)}", mix))
    return proposals


def _common(problem: Problem) -> list[Action]:
    """List the actions that most sites offer, in the order of the space."""
    free = [actions for actions in problem.space.choices.values() if len(actions) > 1]
    known = dict.fromkeys(action for actions in free for action in actions)
    return [
        action
        for action in known
        if sum(action in actions for actions in free) >= OFFERED * len(free)
    ]


def _uniform(problem: Problem, action: Action) -> Policy:
    """Give every site the action; one that lacks it, the choice nearest in price."""
    table = problem.prices[0].table if problem.prices else {}
    choices = problem.space.choices
    offering = [site for site in table if action in choices[site]]
    dearest = sum(max(table[site]) for site in offering)
    spent = sum(table[site][choices[site].index(action)] for site in offering)
    share = spent / dearest if dearest else 1.0
    actions = {}
    for site, allowed in choices.items():
        if action in allowed:
            actions[site] = action
        elif table:
            gaps = [abs(price - share * max(table[site])) for price in table[site]]
            actions[site] = allowed[gaps.index(min(gaps))]
        else:
            actions[site] = DENSE if DENSE in allowed else allowed[0]
    return Policy({site.name: actions[site.name] for site in problem.space.sites})


def _straddling(
    problem: Problem, uniform: dict[Action, Policy]
) -> Iterator[tuple[Action, Action]]:
    """Find in each family the neighbouring levels with the first budget between."""
    if not problem.budgets:
        return
    metric, limit = problem.budgets[0].metric, problem.budgets[0].limit
    price = {
        action: problem.price(metric, policy) for action, policy in uniform.items()
    }
    families: dict[Family, list[Action]] = {}
    for action in uniform:
        if action != DENSE:
            families.setdefault(_family(action), []).append(action)
    for family in families.values():
        levels = sorted(family, key=lambda action: price[action])
        # Dense is everybody's dearest level.
        ladder = [*levels, DENSE] if DENSE in uniform else levels
        for low, high in pairwise(ladder):
            if price[low] < limit < price[high]:
                yield low, high


def _family(action: Action) -> Family:
    return tuple((s.method, tuple(name for name, _ in s.params)) for s in action.steps)


def _range(low: Action, high: Action) -> str:
    """Write two levels as one: ``sparsegpt(sparsity=0.6-0.5)``."""
    if _family(low) != _family(high):
        return f"{low} | {high}"
    steps = []
    for one, other in zip(low.steps, high.steps, strict=True):
        pairs = zip(one.params, other.params, strict=True)
        inner = ", ".join(f"{name}={_span(a, b)}" for (name, a), (_, b) in pairs)
        steps.append(f"{one.method}({inner})" if inner else one.method)
    return " + ".join(steps)


def _span(low: Value, high: Value) -> str:
    one, other = format_value(low), format_value(high)
    return one if one == other else f"{one}-{other}"
