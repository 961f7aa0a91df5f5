"""Which whole blocks to remove: one after the other by measurement, or by a score."""

import logging
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity

from autoprune.compression.bank import VariantBank
from autoprune.errors import BudgetError, ConfigError
from autoprune.evaluation.sensitivity import replacement_costs
from autoprune.evaluation.workbench import Workbench
from autoprune.hookspecs import hookimpl
from autoprune.models.blocks import BlockRunner
from autoprune.policy import Action, Policy
from autoprune.searching.budget import prices_of
from autoprune.searching.problem import Problem, Proposal
from autoprune.searching.proposer import Proposer

log = logging.getLogger(__name__)

DROP = Action.parse("drop")

TOKENS = 1024
"""Of split B, on which removals are measured: compared in pairs, few tokens do."""

EXAMPLE = "Give a rule such as {sites: blocks.*.block, actions: [drop, dense]}"


@dataclass(frozen=True, eq=False)
class Removal:
    """The sites that may be dropped, and what dropping them saves.

    Attributes:
        problem: What may be chosen, and the budgets.
        start: The choices before anything is dropped: what costs most of the first
            budget.
        dropped: The choice that drops a site, by its row.
        savings: What that saves of the first budget, by row.
    """

    problem: Problem
    start: Int[np.ndarray, " sites"]
    dropped: dict[int, int]
    savings: dict[int, float]

    @classmethod
    def of(cls, problem: Problem, name: str, kind: str | None = None) -> "Removal":
        """Find what may be dropped.

        Args:
            problem: What may be chosen, with at least one budget.
            name: Who asks, for messages.
            kind: Kind of the sites; None for any.

        Raises:
            ConfigError: If there is no budget, or no site may be dropped.
            BudgetError: If the budgets are not met with all of them dropped.
        """
        space = problem.space
        if not problem.budgets:
            raise ConfigError(
                f"{name} removes blocks until a budget is met, found no budget. Give "
                "objective: budgets, such as {size_bytes: 75%}"
            )
        prices = prices_of(problem.budgets[0].metric, problem.prices)
        costs = prices.padded(space)
        start: NDArray[np.int64] = np.where(np.isfinite(costs), costs, -1).argmax(1)
        dropped = {
            row: space.choices[site.name].index(DROP)
            for row, site in enumerate(space.sites)
            if DROP in space.choices[site.name] and kind in (None, site.kind)
        }
        saved = {
            row: costs[row, start[row]] - costs[row, dropped[row]] for row in dropped
        }
        savings = {row: float(saving) for row, saving in saved.items() if saving > 0}
        if not savings:
            what = "site" if kind is None else f"whole {kind}"
            raise ConfigError(f"{name}: no {what} may be dropped. {EXAMPLE}")
        dropped = {row: dropped[row] for row in savings}
        removal = cls(problem, start, dropped, savings)
        removal._check(name)
        return removal

    def without(self, rows: list[int]) -> Policy:
        """Give the policy that drops some sites and leaves the others as at first."""
        indices = self.start.copy()
        for row in rows:
            indices[row] = self.dropped[row]
        return self.problem.space.at(indices)

    def _check(self, name: str) -> None:
        least = self.without(list(self.dropped))
        for budget in self.problem.budgets:
            found = self.problem.price(budget.metric, least)
            if found > budget.limit:
                raise BudgetError(
                    f"{name}: without all {len(self.dropped)} sites that may be "
                    f"dropped, {budget.metric} counts {found:.6g}, over the limit of "
                    f"{budget.limit:.6g}. Relax the budget, or leave {name} out of "
                    "search: proposals"
                )


class BlockRemoval(Proposer):
    """Drops one site after the other until the budgets are met.

    Attributes:
        kind: Kind of the sites that may go; None for any.
    """

    kind: ClassVar[str | None]

    def propose(self, problem: Problem, bench: Workbench) -> list[Proposal]:
        """Give the first policy within the budgets."""
        removal = Removal.of(problem, self.name, self.kind)
        gone: list[int] = []
        order = self.order(removal, bench)
        while not problem.within(removal.without(gone)):
            gone.append(next(order))
        return [(self.name, removal.without(gone))]

    @abstractmethod
    def order(self, removal: Removal, bench: Workbench) -> Iterator[int]:
        """Yield rows of sites, the first to go first; computed as they are taken."""


class Sleb(BlockRemoval):
    """Remove, time after time, the block without which the rest loses least.

    Every step tries the removal of each block that is left and measures the model
    without it: as many evaluations of a thousand tokens as there are blocks, at half
    the cost each, since blocks before the one that is tried are not run again. How we
    differ: the loss is the KL to the dense model; attentions and MLPs may go as well
    where they may be dropped, and what differs in size is compared by loss per price.
    """

    name = "sleb"
    reference = "Song et al. 2024, SLEB, arXiv:2402.09025, Alg. 1"
    kind = None

    def order(self, removal: Removal, bench: Workbench) -> Iterator[int]:
        """Yield rows of sites as measurements tell."""
        bank, gone = bench.bank(), list[int]()
        left = list(removal.dropped)
        while left:
            grown = growths(removal, bench, bank, gone=gone, tried=left)
            per_price = grown / np.array([removal.savings[row] for row in left])
            best = left[int(per_price.argmin())]
            name = removal.problem.space.sites[best].name
            log.info("%s: %s goes, KL %+.4g", self.name, name, grown[left.index(best)])
            left.remove(best)
            gone.append(best)
            yield best


def growths(
    removal: Removal,
    bench: Workbench,
    bank: VariantBank,
    *,
    gone: list[int],
    tried: list[int],
) -> Float[np.ndarray, " tried"]:
    """Measure by how much the KL grows when one more site goes.

    Args:
        removal: What may be dropped.
        bench: The model, on which nothing is left in the end.
        bank: Whose variants to use.
        gone: Rows of the sites that are gone.
        tried: Rows of the sites to try, each by itself.
    """
    teacher, sites = bench.teacher("fitness"), removal.problem.space.sites
    changes = ({layer: DROP for layer in sites[row].layers} for row in tried)
    base = bench.per_layer(removal.without(gone))
    count, length = bench.splits["fitness"].ids.shape
    windows = range(min(max(TOKENS // length, 1), count))
    costs = list(replacement_costs(bank, teacher, changes, windows, base=base))
    bench.stitched.restore()
    return np.array(costs)


class BlockSimilarity(BlockRemoval):
    """Remove the blocks that turn the hidden states least.

    A block's influence is ``1 - E[cos(x, y)]`` with ``x`` what enters it and ``y`` what
    leaves it, in the dense model: one pass over the blocks. What is left after some
    blocks are gone is not looked at, so it may collapse: try ``sleb`` beside it.
    """

    name = "block_similarity"
    reference = "Men et al. 2024, ShortGPT, arXiv:2403.03853, Eq. 1"
    kind = "block"

    def order(self, removal: Removal, bench: Workbench) -> Iterator[int]:
        """Yield rows of sites by influence, the least first."""
        influences, sites = block_influences(bench), removal.problem.space.sites
        blocks = {row: sites[row].layers[0].block or 0 for row in removal.dropped}
        return iter(sorted(blocks, key=lambda row: influences[blocks[row]]))


def block_influences(bench: Workbench) -> list[float]:
    """Give ``1 - E[cos(x, y)]`` over the tokens of split A for every block."""
    bench.stitched.restore()
    ids = bench.splits["statistics"].ids
    runner = BlockRunner(bench.stitched.model, bench.inventory, ids)
    entering, influences = runner.start(), []
    for block in range(len(bench.inventory.blocks)):
        leaving = runner.run(block, entering)
        pairs = zip(entering, leaving, strict=True)
        cosines = [cosine_similarity(x.float(), y.float(), dim=-1) for x, y in pairs]
        tokens = sum(one.numel() for one in cosines)
        influences.append(
            1 - sum(float(one.double().sum()) for one in cosines) / tokens
        )
        entering = leaving
    return influences


@hookimpl
def register_formulas() -> list[Proposer]:
    """Return the proposers."""
    return [Sleb(), BlockSimilarity()]
