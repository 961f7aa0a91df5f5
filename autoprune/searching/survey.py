"""Takes the slopes that a strategy asks for, at incumbents, and writes them down."""

from autoprune.searching.ledger import Ledger
from autoprune.searching.rows import Trial
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.strategies import SamplerFactory
from autoprune.searching.trial import Evaluator


class Survey:
    """The slopes at incumbents so far.

    Args:
        evaluator: Takes them.
        ledger: Where they are kept.
        factory: The strategy: whether it needs them, and on how many tokens.

    Attributes:
        slopes: By number of the trial.
    """

    def __init__(
        self, evaluator: Evaluator, ledger: Ledger, factory: SamplerFactory
    ) -> None:
        self.slopes: dict[int, SiteSlopes] = ledger.slopes()
        self._evaluator = evaluator
        self._ledger = ledger
        self._factory = factory

    def take(self, best: Trial | None, *, refused: bool) -> None:
        """Take the slopes at the incumbent, once.

        A step that was refused may have been led by noise: then they are taken on
        further windows as well, until none of the split is left.

        Args:
            best: The incumbent; None where there is none yet.
            refused: Whether the last trial did not take its place.
        """
        if best is None or "slopes" not in self._factory.needs:
            return
        known = self.slopes.get(best.number)
        if known and not (refused and len(known.windows) < len(best.windows)):
            return
        turn = len(self.slopes) - bool(known)
        found = self._evaluator.slopes(
            best.policy,
            tokens=self._factory.tokens_at(turn),
            draws=self._factory.draws,
            drawn_tokens=self._factory.drawn_tokens,
            turn=turn,
            beside=known.windows if known else (),
        )
        found = known.joined(found) if known else found
        self._ledger.add_slopes(best.number, found)
        self.slopes[best.number] = found
