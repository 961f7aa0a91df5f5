"""The phases of a run, and how long each takes of one thread or one GPU."""

from collections.abc import Iterator
from dataclasses import dataclass

from autoprune.planning.disk import export_bytes
from autoprune.planning.rates import Span, total
from autoprune.planning.training import training
from autoprune.planning.work import Work
from autoprune.policy import Action, Layer
from autoprune.searching.reserve import RIVAL_KINDS
from autoprune.searching.rivals import SOLVED
from autoprune.searching.sensitivity import GRADIENTS, Sensitivities

PRECISION_WINDOWS = 16
"""On which bfloat16 is compared with float32, once for a model."""

PROPOSAL_S = 0.05
"""What a proposal costs at most; see ``results/search/overhead.json``."""

VERIFYING = 3.0
"""Measurements of the report split that verifying an export is worth; as in
``searching.reserve``."""

MIXES = 3
"""Mixes of two solutions that are measured on the choice split."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a run.

    Attributes:
        name: What it is.
        span: Seconds of one thread or one GPU.
        shared: Whether workers share it out.
    """

    name: str
    span: Span
    shared: bool = False


def phases_of(work: Work, trials: int, *, export: bool = True) -> list[Phase]:
    """Tell how long each phase of a run takes, when nothing is known from before.

    Args:
        work: The run on a device.
        trials: How many there will be.
        export: Whether the winner is exported and verified.
    """
    again = work.outlined.config.bank == "uniform"
    phases = [
        Phase("load", loading(work)),
        Phase("statistics", work.statistics(work.pairs, again=again)),
        Phase("variants", work.variants(work.pairs)),
        Phase("export check", checking(work)),
        Phase("dense model", work.teacher(work.tokens("fitness"))),
        Phase("sensitivities", total(list(sensitivities(work)))),
        Phase("trials", trial(work) * trials, shared=True),
        Phase("finals", finals(work)),
    ]
    if work.outlined.config.recovery:
        phases.append(Phase("training", training(work)))
    return [*phases, Phase("export", exporting(work))] if export else phases


def trial(work: Work) -> Span:
    """Tell how long a trial takes, with its proposal, and slopes if there are any.

    All of the fitness split is measured: what is given up earlier takes less.
    """
    strategy = work.outlined.strategy
    span = work.rates.other(PROPOSAL_S) + work.measured(work.tokens("fitness"))
    if "slopes" in strategy.needs:
        tokens = min(work.tokens("fitness"), strategy.most_slope_tokens)
        drawn = min(tokens, strategy.drawn_tokens)
        span += work.gradients(tokens, strategy.draws, drawn=drawn)
    return span


def loading(work: Work) -> Span:
    """Tell how long it takes until a model and its text are there."""
    rates, window = work.rates, work.outlined.config.text.window
    windows = min(PRECISION_WINDOWS, work.outlined.config.text.statistics)
    span = rates.other(float(rates.record["start_s"]) + float(rates.record["text_s"]))
    if rates.record["bfloat16"]:
        kinds = ("bfloat16", "float32")
        span += total([work.blocks(windows * window, kind) for kind in kinds])
        span += work.head(windows * window) * 2
    return span


def sensitivities(work: Work) -> Iterator[Span]:
    """Tell how long what choices cost by themselves takes, kind by kind."""
    search = work.outlined.config.search
    solved = any(rival in SOLVED for rival in search.rivals)
    wanted = solved and bool(work.outlined.problem.budgets)
    if not wanted and "sensitivities" not in work.outlined.strategy.needs:
        return
    kinds: list[str] = [search.sensitivity]
    if wanted and search.sensitivity in GRADIENTS:
        kinds = list(GRADIENTS)
    text = work.outlined.config.text
    windows, draws = Sensitivities.windows, Sensitivities.draws
    seen = min(windows, text.fitness)
    if kinds == ["measured"]:
        yield work.measured(seen * text.window) * len(_places(work))
        return
    if kinds == ["error"]:
        yield work.statistics(work.pairs, again=True)
        return
    # Every variant is unpacked on the way, and stays in memory as far as it fits.
    yield work.read(work.variant_weights)
    yield work.gradients(seen * text.window, draws)
    if "blend" in kinds:
        passes = max(1, windows * draws // 2)
        some = min(passes, text.fitness)
        yield work.gradients(some * text.window, passes // some, apart=True)


def _places(work: Work) -> list[tuple[str, Action]]:
    space = work.outlined.problem.space
    return [(s.name, a) for s in space.sites for a in space.choices[s.name] if a.steps]


def checking(work: Work) -> Span:
    """Tell how long the export and the reading of the smallest policy take."""
    smallest, _ = export_bytes(work.outlined)
    weights = sum(layer.numel for layer in work.outlined.bench.layers)
    return work.read(3.0 * weights) + work.rates.written(smallest)


def finals(work: Work) -> Span:
    """Tell how long the choice among finalists, refining and the report take."""
    search = work.outlined.config.search
    choice, report = work.tokens("choice"), work.tokens("report")
    candidates = search.finalists + RIVAL_KINDS // 2
    spans = [work.teacher(choice), work.measured(choice) * candidates]
    for _ in range(2 if search.refine != "none" else 0):  # the best and its rival
        spans += [refining(work), work.measured(choice)]
        if search.refine == "mix":
            spans.append(work.gradients(work.tokens("fitness"), 0) * _share(work))
            spans.append(work.measured(choice) * MIXES)
    spans += [work.teacher(report), work.measured(report) * RIVAL_KINDS]
    return total(spans)


def refining(work: Work) -> Span:
    """Tell how long a policy takes to be solved on its own inputs."""
    alone = _dearest(work)
    return work.statistics(alone, again=True) + work.variants(alone)


def exporting(work: Work) -> Span:
    """Tell how long an export takes, and its verification in a fresh process."""
    _, largest = export_bytes(work.outlined)
    weights = sum(layer.numel for layer in work.outlined.bench.layers)
    fresh = work.rates.other(float(work.rates.record["start_s"]))
    reading = work.read(4.0 * weights) + work.rates.written(largest)
    return fresh + reading + work.measured(work.tokens("report")) * VERIFYING


def _dearest(work: Work) -> list[tuple[Layer, Action]]:
    """Give every layer its action of the most steps: what a policy has at the most."""
    chosen: dict[Layer, Action] = {}
    for layer, action in work.pairs:
        if layer not in chosen or len(action.steps) > len(chosen[layer].steps):
            chosen[layer] = action
    return list(chosen.items())


def _share(work: Work) -> float:
    """Tell which share of the variants one a layer is."""
    return sum(la.numel for la, _ in _dearest(work)) / max(1, work.variant_weights)
