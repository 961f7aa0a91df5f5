"""A further round: a bank on the inputs of the incumbent, with half the step."""

from collections.abc import Callable

import numpy as np

from autoprune.policy import Action, Policy, Step, Value
from autoprune.searching.problem import Problem
from autoprune.searching.space import SearchSpace

NEIGHBOURS = 2
"""Choices to either side that stay where an action has no level to halve."""

Takes = Callable[[str, Action], bool]
"""Tells whether a site can take an action."""


def narrowed(problem: Problem, around: Policy, takes: Takes) -> SearchSpace:
    """Keep the choices near a policy, with levels halfway to the next ones.

    A level is the first parameter whose values are fractions (``sparsity``) among
    actions that are alike otherwise. Where the policy's action has one, the site keeps
    its neighbours in that, and gets the two between. Elsewhere (bits are no fractions)
    it keeps the nearest choices in the order of price.

    Args:
        problem: The space of the round before, and its prices.
        around: The incumbent.
        takes: Asked about actions that are new at a site.
    """
    choices = {}
    for site in problem.space.sites:
        allowed = problem.space.choices[site.name]
        chosen = around[site.name]
        near = _halved(allowed, chosen) or _nearest(problem, site.name, chosen)
        choices[site.name] = tuple(
            action
            for action in dict.fromkeys(near)
            if action in allowed or takes(site.name, action)
        )
    return SearchSpace(problem.space.sites, choices)


def _halved(allowed: tuple[Action, ...], chosen: Action) -> list[Action]:
    """List the neighbouring levels of an action and those between; empty if none."""
    for place, step in enumerate(chosen.steps):
        for name, value in step.params:
            if not isinstance(value, float):
                continue
            family = {
                level: action
                for action in allowed
                if (level := _level(action, chosen, place, name)) is not None
            }
            levels = sorted(family)
            at = levels.index(value)
            near = levels[max(0, at - 1) : at + 2]
            if len(near) > 1:
                between = [
                    _with(chosen, place, name, round((low + high) / 2, 6))
                    for low, high in zip(near, near[1:], strict=False)
                ]
                return [*(family[level] for level in near), *between]
    return []


def _level(action: Action, like: Action, place: int, name: str) -> float | None:
    """Give the level of an action that differs from another in nothing else."""
    if place >= len(action.steps):
        return None
    value = dict(action.steps[place].params).get(name)
    if not isinstance(value, float):
        return None
    known = dict(like.steps[place].params)[name]
    return value if _with(action, place, name, known) == like else None


def _with(action: Action, place: int, name: str, value: Value) -> Action:
    """Give an action with another value of one parameter."""
    steps = list(action.steps)
    params = dict(steps[place].params) | {name: value}
    steps[place] = Step(steps[place].method, tuple(sorted(params.items())))
    return Action(tuple(steps))


def _nearest(problem: Problem, site: str, chosen: Action) -> list[Action]:
    allowed = problem.space.choices[site]
    if not problem.prices:
        return list(allowed)
    order = np.argsort(problem.prices[0].table[site], kind="stable")
    at = int(np.flatnonzero(order == allowed.index(chosen))[0])
    near = order[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1]
    return [allowed[index] for index in sorted(near)]
