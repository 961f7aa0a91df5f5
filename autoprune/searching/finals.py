"""The last choice: finalists on text the search never saw, re-solved, beside rivals.

Every trial used variants made on the inputs of one reference policy. The finalist that
is chosen is solved anew, block by block, on the inputs that its own compressed blocks
give, and the better of the two is kept. The best rival gets the same treatment.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autoprune.compression.bank import VariantBank
from autoprune.evaluation.workbench import Measured, Workbench
from autoprune.policy import Policy

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A policy that may become the result.

    Attributes:
        trial: Number of its trial.
        origin: Where it came from; ``uniform ...`` for a rival.
        policy: The policy.
    """

    trial: int
    origin: str
    policy: Policy


@dataclass(frozen=True, eq=False)
class Finalist:
    """A candidate on the choice split, with the bank that serves it best.

    Attributes:
        candidate: The candidate.
        bank: Whose variants it uses: the search's, or those of its own inputs.
        resolved: True if the bank is of its own inputs.
        choice: What it scored on the choice split.
    """

    candidate: Candidate
    bank: VariantBank
    resolved: bool
    choice: Measured

    @property
    def reference(self) -> Policy | None:
        """The reference policy, where it is the candidate itself."""
        return self.candidate.policy if self.resolved else None


def rank(
    bench: Workbench,
    bank: VariantBank,
    candidates: Sequence[Candidate],
    cost: Callable[[Measured], float],
) -> list[Finalist]:
    """Measure candidates on the choice split, the best first.

    Args:
        bench: Model, tokens and metrics.
        bank: The bank of the search.
        candidates: Different policies.
        cost: What to compare them by; smaller is better.
    """
    finalists = [
        Finalist(one, bank, False, bench.measure(one.policy, bank, "choice"))
        for one in candidates
    ]
    return sorted(finalists, key=lambda finalist: cost(finalist.choice))


def resolve_anew(
    bench: Workbench,
    finalist: Finalist,
    cost: Callable[[Measured], float],
    progress: Progress | None = None,
) -> Finalist:
    """Solve a finalist on its own inputs; give it back if that is no better."""
    policy = finalist.candidate.policy
    bank = bench.bank(reference=policy)
    bank.make(bench.per_layer(policy).items(), progress)
    choice = bench.measure(policy, bank, "choice")
    if cost(choice) < cost(finalist.choice):
        return Finalist(finalist.candidate, bank, True, choice)
    return finalist


def report(bench: Workbench, finalist: Finalist) -> dict[str, Any]:
    """Measure a finalist on the report split, and tell how sure the figure is."""
    candidate = finalist.candidate
    measured = bench.measure(candidate.policy, finalist.bank, "report")
    assert measured.quality is not None
    return {
        "trial": candidate.trial,
        "origin": candidate.origin,
        "resolved": finalist.resolved,
        "choice": finalist.choice.metrics,
        "report": measured.metrics,
        "kl_standard_error": measured.quality.kl_error(),
    }
