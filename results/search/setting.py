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
    zeros: list[float] | None = None,
    **search: Any,
) -> Plan:
    """Load SmolLM2-135M with nine levels of SparseGPT for each of its 210 layers.

    Args:
        target: Zeros over weights in the blocks.
        seed: Of the search; text is split alike for all.
        bank: ``uniform`` for inputs propagated at the target, ``dense`` for none.
        zeros: Levels other than the nine.
        **search: More of the search's settings.
    """
    shown = ", ".join(f"{level:g}" for level in zeros or levels(target))
    config = {
        "model": "demo",
        "text": {
            "source": f"file:{ARTICLES}" if ARTICLES.exists() else "builtin",
            "window": 512,
            "statistics": 32,
            "fitness": 24,
            "choice": 16,
            "report": 32,
        },
        "fuse": False,
        "space": [{"actions": [f"sparsegpt(sparsity=[{shown}])"]}],
        "bank": bank,
        "objective": {"metric": "kl", "budgets": {"sparsity": target - ROUNDING}},
        "search": {"trials": 1, "seed": 0} | search,
    }
    return Plan.make(RunConfig.from_dict(config), load_plugins())


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
