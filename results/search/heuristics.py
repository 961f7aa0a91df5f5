"""OWL and AlphaPruning, rivals of the search benchmark: zeros a block by a formula.

Both give every block a ratio of zeros and every layer of the block the same. The ratio
goes to the nearest level of the plan's space, and a few layers a level on, until the
budget is met as all others meet it.
"""

from autoprune_plugins.layer_importance import Owl
from autoprune_plugins.layer_ratios import AlphaPruning

from autoprune.policy import Policy
from autoprune.searching.formulas import Formula, Ladder
from autoprune.searching.plan import Plan


def owl(plan: Plan, target: float) -> Policy:
    """Prune blocks with more outliers less.

    Args:
        plan: Of a space of sparsities, with a budget on them.
        target: Zeros over weights in the blocks.
    """
    return _policy(Owl(), plan, target)


def alpha_pruning(plan: Plan, target: float) -> Policy:
    """Prune blocks whose spectra have lighter tails more; needs no text.

    Args:
        plan: Of a space of sparsities, with a budget on them.
        target: Zeros over weights in the blocks.
    """
    return _policy(AlphaPruning(), plan, target)


def _policy(formula: Formula, plan: Plan, target: float) -> Policy:
    ladder = Ladder.of(plan.problem, target)
    (ratios,) = formula.ratios(ladder, plan.bench).values()
    return ladder.policy(dict(zip(ladder.layers, ratios, strict=True)))
