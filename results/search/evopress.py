"""EvoPress, the rival of the search benchmark: evolution from the uniform policy.

Written from Sieberling et al., "EvoPress" (ICML 2025, arXiv:2410.14649), Algorithm 1
and appendix: a (1 + lambda) evolution over one level a layer. A mutation switches
levels, one layer up and one down, so that the number of zeros never changes; how many
switches is the smaller of two draws from 1 to 3. Offspring are selected in stages, each
on a fresh minibatch that all of them share, each with more tokens and fewer survivors;
the parent takes part in the last one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Levels = NDArray[np.int64]
"""A level for every layer, ``[layers]``."""


@dataclass(frozen=True)
class Stage:
    """One stage of selection: how many survive it, and the windows it looks at."""

    survivors: int
    windows: int


OFFSPRING = 16
STAGES = (Stage(1, 1), Stage(1, 4))
"""The paper's super-fast form, scaled down for a CPU: 16 offspring on one window of 256
tokens, then the best of them and the parent on four. The paper has 512 and 8,192; its
ablation of the first stage shows little loss down to 128."""


@dataclass(frozen=True)
class Generation:
    """What one generation came to.

    Attributes:
        number: Counted from 1.
        parent: The levels that the next one starts from.
        evaluations: Policies evaluated so far.
        tokens: Tokens evaluated so far.
        cpu_s: CPU seconds so far.
    """

    number: int
    parent: Levels
    evaluations: int
    tokens: int
    cpu_s: float


def mutate(
    parent: Levels, groups: NDArray[np.int64], highest: Levels, rng: Generator
) -> Levels:
    """Switch levels of a few pairs of layers, one up and one down.

    Args:
        parent: Levels, counted from 0.
        groups: Layers whose levels weigh the same, by number of the group.
        highest: Highest level of each layer.
        rng: The only source of chance.
    """
    child = parent.copy()
    for _ in range(min(rng.integers(1, 4), rng.integers(1, 4))):
        while True:
            up, down = rng.integers(len(child)), rng.integers(len(child))
            same = groups[up] == groups[down] and up != down
            if same and child[up] < highest[up] and child[down] > 0:
                break
        child[up] += 1
        child[down] -= 1
    return child


def evolve(
    start: Levels,
    groups: NDArray[np.int64],
    highest: Levels,
    score: Callable[[Levels, Sequence[int]], float],
    *,
    windows: int,
    window_tokens: int,
    generations: int,
    seed: int,
    offspring: int = OFFSPRING,
    stages: Sequence[Stage] = STAGES,
) -> Iterator[Generation]:
    """Evolve levels; every generation is given as soon as it is done.

    Args:
        start: Where to begin: the uniform policy.
        groups: See ``mutate``.
        highest: See ``mutate``.
        score: Divergence of levels on some windows; less is better.
        windows: How many windows there are to draw minibatches from.
        window_tokens: Tokens of a window, for the books.
        generations: How many.
        seed: Of everything random.
        offspring: Children a generation.
        stages: From the first to the last.
    """
    rng = np.random.default_rng(seed)
    parent, evaluations, tokens = start.copy(), 0, 0
    began = time.process_time()
    for number in range(1, generations + 1):
        alive: list[Levels] = []
        while len(alive) < offspring:
            child = mutate(parent, groups, highest, rng)
            if not any((child == other).all() for other in [parent, *alive]):
                alive.append(child)
        for stage in stages:
            batch = rng.choice(windows, stage.windows, replace=False).tolist()
            if stage is stages[-1]:
                alive.append(parent)
            scores = [score(levels, batch) for levels in alive]
            evaluations += len(alive)
            tokens += len(alive) * stage.windows * window_tokens
            order = np.argsort(scores, kind="stable")[: stage.survivors]
            alive = [alive[i] for i in order]
        parent = alive[0]
        spent = time.process_time() - began
        yield Generation(number, parent, evaluations, tokens, spent)
