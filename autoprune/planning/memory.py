"""The most memory that the processes of a run take, and when."""

from dataclasses import dataclass, replace

from autoprune.compression.memory import MEMORY_SHARE
from autoprune.compression.sweep import CHUNK_BYTES
from autoprune.evaluation.slopes import GROUP
from autoprune.evaluation.teacher import HEADS
from autoprune.models.prefix import CAP_BYTES
from autoprune.planning.training import training_bytes
from autoprune.planning.work import HESSIAN, Work
from autoprune.policy import Layer
from autoprune.searching.rivals import SOLVED
from autoprune.searching.sensitivity import GRADIENTS

FLOAT, HALF = 4, 2

LIBRARIES = 16e6
"""Bytes that libraries keep once they work, whatever the model (measured)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process takes at the most, in bytes.

    Attributes:
        base: Interpreter and libraries.
        model: Its weights, mapped from the file where they are computed in as stored:
            one time for all processes of a machine.
        heads: Heads in float32, and what the dense model expects of each.
        held: Weights of variants, up to a quarter of the machine's memory.
        prefix: Hidden states that blocks have left.
        working: The largest of what phases need beside: gradients in trials, a pass
            over the blocks in the preparation.
        copied: Whether the model's weights are in memory of the process's own.
    """

    base: float
    model: float
    heads: float
    held: float
    prefix: float
    working: float
    copied: bool

    @property
    def own(self) -> float:
        """What the process does not share."""
        model = self.model if self.copied else 0.0
        parts = self.base, self.heads, self.held, self.prefix, self.working
        return model + sum(parts)

    @property
    def shared(self) -> float:
        """What all processes of a machine have one time."""
        return 0.0 if self.copied else self.model


def driver_memory(work: Work, *, workers: int) -> Memory:
    """Tell the memory of the process that drives, in the phase that takes the most.

    It prepares by itself, then evaluates unless workers do so, and it concludes.

    Args:
        work: The run on a device.
        workers: Who evaluates beside it.
    """
    text, gradient = work.outlined.config.text, gradient_bytes(work)
    prepares = _memory(work, working=pass_bytes(work, max_settings(work)))
    searches = _memory(
        work,
        heads=heads_bytes(work, text.fitness),
        working=gradient if not workers or needs_gradients(work) else 0.0,
        holds=True,
    )
    splits = text.fitness, text.choice, text.report
    concludes = _memory(
        work,
        heads=sum(heads_bytes(work, windows) for windows in splits),
        working=max(pass_bytes(work, 1), gradient),
        holds=True,
    )
    trains = replace(concludes, working=training_bytes(work) + gradient)
    found = [prepares, searches, concludes]
    found += [trains] if work.outlined.config.recovery else []
    return max(found, key=lambda one: one.own)


def worker_memory(work: Work) -> Memory:
    """Tell the memory of a worker: it measures trials and takes slopes."""
    slopes = "slopes" in work.outlined.strategy.needs
    return _memory(
        work,
        heads=heads_bytes(work, work.outlined.config.text.fitness),
        working=gradient_bytes(work) if slopes else forward_bytes(work),
        holds=True,
    )


def needs_gradients(work: Work) -> bool:
    """Tell whether the driver takes gradients before the search: for rivals."""
    search, budgets = work.outlined.config.search, work.outlined.problem.budgets
    rivals = any(rival in SOLVED for rival in search.rivals) and bool(budgets)
    wanted = rivals or "sensitivities" in work.outlined.strategy.needs
    return wanted and search.sensitivity in GRADIENTS


def _memory(
    work: Work, *, working: float, heads: float = 0.0, holds: bool = False
) -> Memory:
    """Add up a process; while it measures policies it ``holds`` what they share."""
    bench, size = work.outlined.bench, _item(work)
    numel = sum(layer.numel for layer in bench.layers)
    numel += sum(part.numel for part in bench.untouched.values())
    cap = MEMORY_SHARE * float(work.rates.record["memory_bytes"])
    tokens = work.tokens("fitness")
    left = 2 * len(bench.inventory.blocks) * tokens * work.outlined.hidden * size
    return Memory(
        base=float(work.rates.record["base_bytes"]),
        model=float(numel * size),
        heads=heads,
        held=min(float(HALF * work.variant_weights), cap) if holds else 0.0,
        prefix=float(min(left, CAP_BYTES)) if holds else 0.0,
        working=working,
        copied=bench.layers[0].dtype != work.rates.compute,
    )


def heads_bytes(work: Work, windows: int) -> float:
    """Tell what a teacher holds: a head in float32 for each of its states."""
    outlined = work.outlined
    embedding = [la for la in outlined.bench.layers if la.input is None]
    states = 1
    if outlined.bench.inventory.tied and embedding:
        own = {action for layer, action in work.pairs if layer in embedding}
        states += min(HEADS, len(own))
    positions = windows * (outlined.config.text.window - 1)
    head = outlined.vocabulary * outlined.hidden
    return float(FLOAT * states * (head + positions * outlined.hidden))


def forward_bytes(work: Work) -> float:
    """Tell what a forward pass over a batch of eight windows takes at the most."""
    text = work.outlined.config.text
    tokens = min(8, text.fitness) * text.window
    widest = max(sum(layer.shape) for layer in work.layers)
    return float(3 * tokens * widest * FLOAT)


def gradient_bytes(work: Work) -> float:
    """Tell what a backward pass holds: activations, and the changes of a layer."""
    text = work.outlined.config.text
    counts: dict[Layer, int] = {}
    for layer, _ in work.pairs:
        counts[layer] = counts.get(layer, 0) + 1
    outside = [(layer, count) for layer, count in counts.items() if layer.input is None]
    # What is priced by its parameter's gradient has windows pass one by one.
    group = text.window if outside else max(GROUP, text.window)
    tokens = min(group, work.tokens("fitness"))
    channels = sum(sum(layer.shape) for layer in work.layers)
    activations = float(work.rates.record["activation_bytes"]) * tokens * channels
    changes = [
        layer.numel * (count + 3) * _item(work) for layer, count in counts.items()
    ]
    # Of a head: its gradient, and all changes in float32 beside those as stored.
    changes += [
        layer.numel * (2 * FLOAT + count * (FLOAT + _item(work)))
        for layer, count in outside
    ]
    return activations + max(changes, default=0)


def max_settings(work: Work) -> int:
    """Tell how many variants of a layer come of one call of a method."""
    most: dict[tuple[Layer, str], int] = {}
    for layer, action in work.pairs:
        place = layer, action.steps[0].method
        most[place] = most.get(place, 0) + 1
    return max(most.values(), default=0)


def pass_bytes(work: Work, settings: int, *, tokens: int | None = None) -> float:
    """Tell the most that a pass over the blocks takes: flat in depth.

    The Hessians that are left of a block, the factor of one of them, the weights, and
    for every setting their errors in float32, the outcome and a mask; beside them the
    weights of a block of the policy that leads the pass, and all hidden states twice.

    Args:
        work: The run on a device.
        settings: Variants of a layer that are made in one call.
        tokens: Of the statistics; those of the configuration by default.
    """
    actions, first = work.outlined.bench.actions, work.layers[0].block
    block = [layer for layer in work.layers if layer.block == first]
    given = {la for la, action in work.pairs if HESSIAN in actions.needs(action)}
    inputs: dict[str, list[Layer]] = {}
    for layer in block:
        if layer in given and layer.input is not None:
            inputs.setdefault(layer.input, []).append(layer)
    widths = [layers[0].shape[1] for layers in inputs.values()]
    most = 0.0
    for index, layers in enumerate(inputs.values()):
        waiting = sum(FLOAT * width**2 for width in widths[index:])
        factor = FLOAT * widths[index] ** 2
        rows = sum(layer.shape[0] for layer in layers)
        stacked = rows * widths[index]
        # Parts of at most so many bytes of errors are swept at a time.
        errors = min(FLOAT * stacked * settings, max(CHUNK_BYTES, FLOAT * stacked))
        made = stacked * settings * (HALF + 1)
        most = max(most, waiting + factor + HALF * stacked + errors + made)
    if not inputs:
        most = max((layer.numel * 4.0 * FLOAT for layer in block), default=0.0)
    weights = sum(layer.numel for layer in block) * HALF
    seen = work.tokens("statistics") if tokens is None else tokens
    hidden = 2 * seen * work.outlined.hidden * _item(work)
    return float(LIBRARIES + most + weights + hidden)


def _item(work: Work) -> int:
    return HALF if work.rates.compute == "bfloat16" else FLOAT
