"""What all cells of the search benchmark share: model, text, levels and banks."""

from pathlib import Path
from typing import Any

from autoprune.config import RunConfig
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Policy
from autoprune.searching.plan import Plan

ARTICLES = Path(__file__).parents[3] / "shared/data/wikitext-2/valid.articles.jsonl"
"""WikiText-2 where it is at hand; else the text that CPython ships."""

TARGETS = (0.5, 0.6, 0.7)
ROUNDING = 1e-5
"""Counts are rounded layer by layer; this much less keeps the uniform policy legal."""

FITNESS = 16
"""Windows of the fitness split."""

STEP, REACH = 0.06, 4
"""Nine levels a layer: the target and four steps to either side."""


def levels(target: float) -> list[float]:
    """List the levels of a target, from few zeros to many."""
    return [round(target + STEP * k, 4) for k in range(-REACH, REACH + 1)]


def open_plan(
    target: float,
    *,
    seed: int = 0,
    bank: str = "uniform",
    rules: list[dict[str, Any]] | None = None,
    **search: Any,
) -> Plan:
    """Load SmolLM2-135M with nine levels of SparseGPT for each of its 210 layers.

    Args:
        target: Zeros over weights in the blocks.
        seed: Of the search; text is split alike for all.
        bank: ``uniform`` for inputs propagated at the target, ``dense`` for none.
        rules: Of the space, in the place of the nine levels.
        **search: More of the search's settings.
    """
    return open_space(
        rules or [{"actions": [_actions(levels(target))]}],
        {"sparsity": target - ROUNDING},
        fuse=False,
        bank=bank,
        **search,
    )


def open_space(
    rules: list[dict[str, Any]],
    budgets: dict[str, float],
    *,
    fuse: bool = True,
    bank: str = "uniform",
    **search: Any,
) -> Plan:
    """Load SmolLM2-135M with any space, on the text that all cells share.

    Args:
        rules: Of the space: the actions that sites may take.
        budgets: Limits by metric.
        fuse: Layers that runtimes fuse share one action.
        bank: ``uniform`` for inputs propagated at the budget, ``dense`` for none.
        **search: More of the search's settings.
    """
    config = {
        "model": "demo",
        "text": {
            "source": f"file:{ARTICLES}" if ARTICLES.exists() else "builtin",
            "window": 256,
            "statistics": 64,
            "fitness": FITNESS,
            "choice": 16,
            "report": 64,
        },
        "fuse": fuse,
        "space": rules,
        "bank": bank,
        "objective": {"metric": "kl", "budgets": budgets},
        "search": {"trials": 1, "seed": 0} | search,
    }
    return Plan.make(RunConfig.from_dict(config), load_plugins())


OWN_REACH = 8
"""Levels of EvoPress's own bank to either side of the target, as in its script."""

HIDDEN = 576
OWN_SIZES = {
    "blocks.*.q_proj": 576 * 576,
    "blocks.*.o": 576 * 576,
    "blocks.*.[kv]_proj": 192 * 576,
    "blocks.*.gate_up.*": 1536 * 576,
    "blocks.*.down": 1536 * 576,
}
"""Sites of SmolLM2-135M by the weights of their layer."""


def open_own(target: float) -> Plan:
    """Load SmolLM2-135M with EvoPress's own bank: dense inputs, its own levels.

    A level is the same number of weights in every layer, by its script half of
    ``min(S, 1 - S) / 8`` of the square of the hidden size, so any two layers can
    exchange one.
    """
    step = round(0.5 * min(target, 1 - target) / OWN_REACH * HIDDEN**2)
    rules = []
    for sites, numel in OWN_SIZES.items():
        found = [target + k * step / numel for k in range(-OWN_REACH, OWN_REACH + 1)]
        zeros = [round(level, 6) for level in found if 0 < level < 1]
        rules.append({"sites": sites, "actions": [_actions(zeros)]})
    return open_plan(target, bank="dense", rules=rules)


def _actions(zeros: list[float]) -> str:
    return f"sparsegpt(sparsity=[{', '.join(f'{level:.6g}' for level in zeros)}])"


def uniform(plan: Plan, target: float) -> Policy:
    """Give the policy with the target's level everywhere."""
    action = plan.bench.actions.canonical(
        Action.parse(f"sparsegpt(sparsity={target:g})")
    )
    choices = plan.problem.space.choices
    return Policy(
        {
            site.name: action if len(choices[site.name]) > 1 else choices[site.name][0]
            for site in plan.problem.space.sites
        }
    )
