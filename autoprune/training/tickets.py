"""Iterative magnitude pruning: train, prune, and train again, from here or from before.

The loop knows no model and no data. It calls a function of the caller's that trains
from one step to another; so the course of the learning rate is the caller's too, as a
function of the step. Steps from ``settings.steps`` on are those of fine-tuning.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from autoprune.errors import ConfigError, unknown_name
from autoprune.training.choosing import SCOPES, prune_smallest

State = dict[str, Tensor]
"""What a training begins and ends with: a model's ``state_dict``, and what else the
caller puts in it, such as the optimizer's momentum."""

REWINDS = ("none", "weights", "rate")
"""What goes back to an earlier step after each pruning."""


@runtime_checkable
class TrainFrom(Protocol):
    """Trains a model, as the caller does it."""

    def __call__(
        self,
        state: State,
        kept: Mapping[str, Bool[Tensor, "..."]],
        *,
        start: int,
        stop: int,
    ) -> tuple[State, float]:
        """Train with what is pruned held at zero.

        Args:
            state: What to begin with; not to be written to.
            kept: By parameter, True where a weight stays; empty while all do.
            start: First step, for the learning rate and the order of the data.
            stop: The step after the last one.

        Returns:
            What it ended with, in tensors of its own, and its quality on validation
            data; more is better.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class TicketSettings:
    """How weights are pruned and trained in turn.

    Attributes:
        steps: Of the first, dense training: the length of its learning rate's course.
        rewind_to: Step from which a round trains. With ``none`` it only gives the
            number of steps of a round, ``steps - rewind_to``, the same for all three.
        rewind: ``weights`` puts the weights that stay back to what they were at
            ``rewind_to`` (Frankle et al. 2020, arXiv:1912.05671, Alg. 2), and with them
            the learning rate; 0 is the first lottery ticket (arXiv:1803.03635).
            ``rate`` puts the learning rate alone back (Renda et al. 2020,
            arXiv:2003.02389). ``none`` is fine-tuning: steps go on, from
            ``steps`` up.
        per: Weights that compete, one of ``choosing.SCOPES``.

    Raises:
        ConfigError: If a setting is out of its range; names it.
    """

    steps: int
    rewind_to: int
    rewind: str = "weights"
    per: str = "model"

    def __post_init__(self) -> None:
        if self.rewind not in REWINDS:
            raise ConfigError(unknown_name("rewinding", self.rewind, REWINDS))
        if self.per not in SCOPES:
            raise ConfigError(unknown_name("scope", self.per, SCOPES))
        if not 0 <= self.rewind_to < self.steps:
            raise ConfigError(
                f"a round goes back to a step in [0, {self.steps}), found "
                f"{self.rewind_to}"
            )


@dataclass(frozen=True, eq=False, slots=True)
class Round:
    """A model after its training, the dense one or one of the pruned.

    Attributes:
        number: 0 for the dense model.
        sparsity: Share of the weights of the named parameters that is pruned.
        kept: By parameter, True where a weight stays; empty for the dense model.
        state: What the training ended with.
        quality: On validation data; more is better.
        steps: Trained until now, all together.
    """

    number: int
    sparsity: float
    kept: dict[str, Bool[Tensor, "..."]]
    state: State
    quality: float
    steps: int


def rounds_of_tickets(
    state: State,
    names: Iterable[str],
    sparsities: Iterable[float],
    train_from: TrainFrom,
    settings: TicketSettings,
) -> Iterator[Round]:
    """Give the dense model, then the model after each round of pruning and training.

    Each round prunes the smallest weights of the round before: ``round(sparsity * n)``
    in each scope, those pruned before among them. Nothing is done before it is asked
    for: a caller who stops to ask ends the loop.

    Args:
        state: Before any training.
        names: Of the parameters that are pruned.
        sparsities: After each round, never falling; see ``shrinking``.
        train_from: Trains.
        settings: How.
    """
    names, begin = list(names), settings.rewind_to
    early = state
    if begin:
        early, _ = train_from(state, {}, start=0, stop=begin)
    state, quality = train_from(early, {}, start=begin, stop=settings.steps)
    done, kept = settings.steps, dict[str, Tensor]()
    yield Round(0, 0.0, kept, state, quality, done)
    start = settings.steps if settings.rewind == "none" else begin
    for number, sparsity in enumerate(sparsities, 1):
        kept = _shrunk(state, names, kept, sparsity, settings.per)
        source = early if settings.rewind == "weights" else state
        stop = start + settings.steps - begin
        state, quality = train_from(_masked(source, kept), kept, start=start, stop=stop)
        done += stop - start
        yield Round(number, sparsity, kept, state, quality, done)
        if settings.rewind == "none":
            start = stop


def best_ticket(rounds: Iterable[Round], is_good: Callable[[Round], bool]) -> Round:
    """Give the sparsest model that is good enough; the first that is not ends the loop.

    Args:
        rounds: Of ``rounds_of_tickets``, with sparsities as many as it may take.
        is_good: The criterion, such as a quality that is not to be undercut.

    Raises:
        ConfigError: If not even the first is.
    """
    best: Round | None = None
    for one in rounds:
        if not is_good(one):
            break
        best = one
    if best is None:
        raise ConfigError(
            "not even the dense model meets the criterion at which pruning ends. Train "
            "it for longer, or ask for less."
        )
    return best


def shrinking(
    share: float = 0.2, *, rounds: int | None = None, final: float | None = None
) -> Iterator[float]:
    """Give sparsities of rounds that each prune the same share of what is left.

    Args:
        share: Pruned in each round, in (0, 1); with ``final`` it follows from it.
        rounds: How many; None for no end.
        final: Sparsity after the last of the rounds, in [0, 1).

    Example:
        >>> [round(sparsity, 3) for sparsity in shrinking(0.2, rounds=3)]
        [0.2, 0.36, 0.488]
        >>> [round(sparsity, 3) for sparsity in shrinking(rounds=2, final=0.75)]
        [0.5, 0.75]
    """
    if final is not None:
        if rounds is None or not 0 <= final < 1:
            raise ConfigError(
                f"a final sparsity in [0, 1) needs a number of rounds, found {final} "
                f"and {rounds} rounds"
            )
        for number in range(1, rounds):
            yield 1 - (1 - final) ** (number / rounds)
        yield final  # not off by a rounding
        return
    if not 0 < share < 1:
        raise ConfigError(f"a round prunes a share in (0, 1), found {share}")
    number = 0
    while rounds is None or number < rounds:
        number += 1
        yield 1 - (1 - share) ** number


def _shrunk(
    state: State,
    names: Iterable[str],
    kept: Mapping[str, Tensor],
    sparsity: float,
    per: str,
) -> dict[str, Tensor]:
    """Prune the smallest weights that are left."""
    scores = {name: state[name].abs() for name in names}
    for name, mask in kept.items():
        scores[name].masked_fill_(~mask, -1.0)  # also beside a living zero
    pruned = prune_smallest(scores, sparsity, per=per)
    return {name: ~mask for name, mask in pruned.items()}


@torch.no_grad()
def _masked(state: State, kept: Mapping[str, Tensor]) -> State:
    """Give a state whose pruned weights are ``+0.0``; others are not copied."""
    masked = {name: state[name].masked_fill(~mask, 0.0) for name, mask in kept.items()}
    return {**state, **masked}
