"""Has slopes taken that a strategy asks for, at incumbents, and writes them down."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autoprune.searching.crew import TakeSlopes
from autoprune.searching.ledger import Ledger
from autoprune.searching.rows import Trial
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.strategies import SamplerFactory


@dataclass(eq=False)
class _Taking:
    """Slopes that are being taken, share by share."""

    best: Trial
    asked: int
    jobs: list[TakeSlopes]
    parts: dict[int, SiteSlopes] = field(default_factory=dict)


class Survey:
    """The slopes at incumbents so far, and those that are being taken.

    Args:
        ledger: Where they are kept.
        factory: The strategy: whether it needs them, and on how many tokens.
        shares: In how many parts they are taken, by as many workers.

    Attributes:
        slopes: By number of the trial.
    """

    def __init__(self, ledger: Ledger, factory: SamplerFactory, shares: int) -> None:
        self.slopes: dict[int, SiteSlopes] = ledger.slopes()
        self._ledger = ledger
        self._factory = factory
        self._shares = shares
        self._taking: _Taking | None = None

    @property
    def busy(self) -> bool:
        """True while slopes are being taken."""
        return self._taking is not None

    def want(self, best: Trial | None, *, refused: bool, asked: int) -> None:
        """Begin to take the slopes at the incumbent, if that is due.

        A step that was refused may have been led by noise: then they are taken on
        further windows as well, until none of the split is left.

        Args:
            best: The incumbent; None where there is none yet.
            refused: Whether the last trial did not take its place.
            asked: Trials that were asked for so far. Before each of them slopes are
                taken once, also in a run that was killed in between.
        """
        if self.busy or best is None or "slopes" not in self._factory.needs:
            return
        known = self.slopes.get(best.number)
        seen = known.windows if known else ()
        more = refused and len(seen) < len(best.windows)
        if known and (not more or known.asked == asked):
            return
        turn = len(self.slopes) - bool(known)
        left = len(best.windows) - len(seen)
        shares = max(1, min(self._shares, left))
        jobs = [
            TakeSlopes(
                best.policy,
                tokens=self._factory.tokens_at(turn),
                draws=self._factory.draws,
                drawn_tokens=self._factory.drawn_tokens,
                turn=turn,
                beside=seen,
                part=(share, shares),
            )
            for share in range(shares)
        ]
        self._taking = _Taking(best, asked, jobs)

    def next_job(self) -> TakeSlopes | None:
        """Give a share that nobody takes yet."""
        return self._taking.jobs.pop(0) if self._taking and self._taking.jobs else None

    def give_back(self, job: TakeSlopes) -> None:
        """Take a share back whose worker is gone."""
        assert self._taking is not None
        self._taking.jobs.insert(0, job)

    def hear(self, job: TakeSlopes, found: SiteSlopes) -> None:
        """Take note of a share; write the slopes once all are there.

        Raises:
            RunError: If they cannot be written.
        """
        taking = self._taking
        assert taking is not None
        share, shares = job.part
        taking.parts[share] = found
        if len(taking.parts) < shares:
            return
        self._taking = None
        parts: Sequence[SiteSlopes] = [taking.parts[n] for n in range(shares)]
        number = taking.best.number
        whole, known = SiteSlopes.pooled(parts), self.slopes.get(number)
        whole = replace(known.joined(whole) if known else whole, asked=taking.asked)
        self._ledger.add_slopes(number, whole)
        self.slopes[number] = whole
