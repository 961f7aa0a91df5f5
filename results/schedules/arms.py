"""When to prune: the arms of ``from_scratch.py``, each a whole training of equal steps.

Half of the steps train the dense model where an arm prunes afterwards, and half train
what is left: at once, or in ``ROUNDS``. Arms of a seed share that dense training, whose
CPU time counts for each. Fine-tuning goes on at the learning rate that the dense
training ended with; a rewound one begins the course again, or where its round does.

Rounds of equal steps in all are short ones: weights that go back lose what the rounds
before have learnt. In panels named ``long`` every round trains nearly as long as the
dense model, as in the papers, and one-shot pruning has as many rounds, of which the
first prunes all.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial

import torch
from channel_arms import CHANNELS, CUT
from small_models import STEPS, Result, Run, State, course, scenes
from torch import Tensor

from autoprune.models.gradients import TEMPERATURE
from autoprune.training.at_start import (
    grasp_scores,
    keep_largest,
    keep_random,
    magnitude_scores,
    snip_scores,
)
from autoprune.training.choosing import prune_smallest
from autoprune.training.mask_rules import DropAndGrow, GradualMagnitude
from autoprune.training.masks import FrozenMasks
from autoprune.training.moving_masks import MaskRule, MovingMasks
from autoprune.training.ramps import Ramp
from autoprune.training.synflow import keep_synflow
from autoprune.training.tickets import (
    Round,
    TicketSettings,
    rounds_of_tickets,
    shrinking,
)

HALF, ROUNDS = STEPS // 2, 4
PART = HALF // ROUNDS
"""Steps of a round."""

EARLY = HALF // 10
"""Step that long rounds go back to."""

LONG = HALF + ROUNDS * (HALF - EARLY)
"""Steps of an arm with long rounds, all its trainings together."""

INTERVAL = 8
"""Steps between two renewals of masks that move."""

EXAMPLES = 128
"""On which gradients before training are taken: ten for each class of ten."""

Arm = Callable[[str, int, float], Result]
"""Trains a scene's model of a seed to a sparsity."""


def finished(run: Run, masks: FrozenMasks | MovingMasks, sparsity: float) -> Result:
    """Judge a model, and see that its zeros are those that were asked for."""
    masks.check()
    names = run.scene.names(run.model)
    size = sum(run.model.get_parameter(name).numel() for name in names)
    assert sum(masks.pruned.values()) == round(sparsity * size)
    return {"accuracy": run.scene.accuracy(run.model), "seconds": run.seconds}


def dense(scene: str, seed: int, sparsity: float) -> Result:
    """Train the dense model for all steps."""
    run = Run(scenes()[scene], seed)
    run.train(course(STEPS), 0, STEPS)
    return {"accuracy": run.scene.accuracy(run.model), "seconds": run.seconds}


# After training


@cache
def first_half(scene: str, seed: int, stop: int) -> tuple[State, float, float]:
    """Train the dense model up to a step: its state, accuracy and CPU seconds."""
    run, begin = Run(scenes()[scene], seed), 0
    if stop > HALF - PART:  # where rounds go back to
        begin = HALF - PART
        state, _, run.seconds = first_half(scene, seed, begin)
        run.load(state)
    run.train(course(HALF), begin, stop)
    return run.state(), run.scene.accuracy(run.model), run.seconds


def tickets(
    scene: str,
    seed: int,
    sparsity: float,
    *,
    rewind: str,
    rounds: int,
    long: bool = False,
) -> Result:
    """Train, prune and train again, in one round or more; long ones are ``ROUNDS``."""
    run = Run(scenes()[scene], seed)
    names = run.scene.names(run.model)

    def train_from(
        state: State, kept: Mapping[str, Tensor], *, start: int, stop: int
    ) -> tuple[State, float]:
        if not kept:
            found, accuracy, seconds = first_half(scene, seed, stop)
            run.seconds = seconds
            return found, accuracy
        return run.train_from(state, kept, start=start, stop=stop, rate=course(HALF))

    back = EARLY if long else HALF - HALF // rounds
    settings = TicketSettings(steps=HALF, rewind_to=back, rewind=rewind)
    sparsities = list(shrinking(rounds=rounds, final=sparsity))
    if long and rounds == 1:
        sparsities *= ROUNDS
    found = list(
        rounds_of_tickets(run.state(), names, sparsities, train_from, settings)
    )
    assert found[-1].steps == (LONG if long else STEPS)
    masks = FrozenMasks.of_parameters(run.model, found[-1].kept)
    result = finished(run, masks, sparsity)
    if rounds == 1:
        result["half"] = found[0].quality
        result["bare"] = bare(run, found[0], names, sparsity)
    return result


def bare(run: Run, trained: Round, names: Iterable[str], sparsity: float) -> float:
    """Give the accuracy of a trained model that is pruned and not trained again."""
    run.load(trained.state)
    named = {name: run.model.get_parameter(name).detach().abs() for name in names}
    pruned = prune_smallest(named, sparsity)
    FrozenMasks.of_parameters(run.model, {n: ~mask for n, mask in pruned.items()})
    return run.scene.accuracy(run.model)


# During training


def gradual(scene: str, seed: int, sparsity: float, *, comes_back: bool) -> Result:
    """Prune along a cubic ramp, from a tenth to three quarters of the steps."""
    end = STEPS * 3 // 4
    ramp = Ramp("cubic", 0.0, sparsity, STEPS // 10, end, INTERVAL)
    run = Run(scenes()[scene], seed)
    masks = FrozenMasks.of_none(run.model, run.scene.names(run.model))
    return _moving(run, masks, GradualMagnitude(ramp, comes_back=comes_back), sparsity)


def drop_and_grow(scene: str, seed: int, sparsity: float, *, growth: str) -> Result:
    """Begin with a random mask of Erdős-Rényi-Kernel, and move it: RigL, SET."""
    run = Run(scenes()[scene], seed)
    masks = FrozenMasks.of_parameters(run.model, _random(run, sparsity))
    rule = DropAndGrow(STEPS, interval=INTERVAL, growth=growth, seed=seed)
    return _moving(run, masks, rule, sparsity)


def _moving(run: Run, masks: FrozenMasks, rule: MaskRule, sparsity: float) -> Result:
    moving = MovingMasks(masks, rule)
    run.train(course(STEPS), 0, STEPS, moving.held)
    return finished(run, moving, sparsity)


# Before training


def at_start(
    scene: str, seed: int, sparsity: float, *, keep: Callable[[Run, float], State]
) -> Result:
    """Prune the untrained model, then train what is left for all steps."""
    run, began = Run(scenes()[scene], seed), time.process_time()
    masks = FrozenMasks.of_parameters(run.model, keep(run, sparsity))
    run.seconds = time.process_time() - began
    run.train(course(STEPS), 0, STEPS, masks.held)
    return finished(run, masks, sparsity)


def _random(run: Run, sparsity: float) -> State:
    names, generator = run.scene.names(run.model), torch.Generator()
    generator.manual_seed(run.seed)
    return keep_random(run.model, names, sparsity, generator=generator)


def _magnitude(run: Run, sparsity: float) -> State:
    names = run.scene.names(run.model)
    return keep_largest(magnitude_scores(run.model, names), sparsity)


def _snip(run: Run, sparsity: float) -> State:
    names, batch = run.scene.names(run.model), run.scene.drawn(run.seed, 0, EXAMPLES)
    scores = snip_scores(run.model, names, lambda: run.loss(batch))
    return keep_largest(scores, sparsity)


def _grasp(run: Run, sparsity: float) -> State:
    names, batch = run.scene.names(run.model), run.scene.drawn(run.seed, 0, EXAMPLES)
    scores = grasp_scores(run.model, names, lambda: run.loss(batch, TEMPERATURE))
    return keep_largest(scores, sparsity)


def _synflow(run: Run, sparsity: float) -> State:
    shape, output = run.scene.ones
    return keep_synflow(
        run.model,
        run.scene.names(run.model),
        sparsity,
        flow=partial(output, run.model),
        shape=shape,
    )


AFTER: dict[str, Arm] = {
    "one-shot": partial(tickets, rewind="none", rounds=1),
    "one-shot-rate": partial(tickets, rewind="rate", rounds=1),
    "iterative": partial(tickets, rewind="none", rounds=ROUNDS),
    "iterative-weights": partial(tickets, rewind="weights", rounds=ROUNDS),
    "iterative-rate": partial(tickets, rewind="rate", rounds=ROUNDS),
}
DURING: dict[str, Arm] = {
    "gradual": partial(gradual, comes_back=False),
    "gradual-comeback": partial(gradual, comes_back=True),
    "rigl": partial(drop_and_grow, growth="gradient"),
    "set": partial(drop_and_grow, growth="random"),
}
BEFORE: dict[str, Arm] = {
    "random-erk": partial(at_start, keep=_random),
    "magnitude": partial(at_start, keep=_magnitude),
    "snip": partial(at_start, keep=_snip),
    "grasp": partial(at_start, keep=_grasp),
    "synflow": partial(at_start, keep=_synflow),
}
LEVELS = {"transformer": (0.9, 0.8), "resnet": (0.95, 0.8)}
"""Sparsities of each scene: of all arms, and of those that prune after or gradually."""


CONTROLS = ("gradual-comeback", "set", "magnitude")
"""Arms that are there to be compared with one other arm; measured last."""


def cells() -> dict[str, tuple[str, float, Arm]]:
    """Give scene, sparsity and arm of every cell, what matters most first."""
    found: dict[str, tuple[str, float, Arm]] = {}
    for scene in LEVELS:
        found[f"{scene}-dense"] = scene, 0.0, dense
    every = {**AFTER, **DURING, **BEFORE}
    few = {**AFTER, "gradual": DURING["gradual"]}
    for number, arms in enumerate((every, few)):
        for name, arm in arms.items():
            for scene, levels in LEVELS.items():
                level = levels[number]
                found[f"{scene}-{100 * level:.0f}-{name}"] = scene, level, arm
        for name, arm in () if number else CHANNELS.items():
            found[f"resnet-channels-{name}"] = "resnet", CUT, arm
    for name, arm in AFTER.items():
        for scene, levels in LEVELS.items():
            every_long = f"{scene}-long-{100 * levels[0]:.0f}-{name}"
            found[every_long] = scene, levels[0], partial(arm, long=True)
    last = [name for name in found if name.endswith(CONTROLS)]
    first = [name for name in found if name not in last]
    return {name: found[name] for name in [*first, *last]}
