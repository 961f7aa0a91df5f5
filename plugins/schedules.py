"""When and how often the steps of a policy are applied."""

from collections.abc import Mapping

from autoprune.compression.method import Parameter, Settings
from autoprune.errors import MethodError
from autoprune.hookspecs import hookimpl
from autoprune.policy import Value
from autoprune.training.ramps import RAMPS, Ramp
from autoprune.training.schedule import Outline, Phase, Schedule

_RAMP = Parameter("ramp", str, "cubic", "How sparsity grows.", choices=RAMPS)


class OneShot(Schedule):
    """All at once; a recovery follows."""

    name = "one-shot"
    reference = "Han et al. 2015, arXiv:1506.02626"

    def phases(self, outline: Outline, settings: Settings) -> list[Phase]:
        """Lay out the one phase."""
        return [Phase(outline.pruning, 1.0)]


class Iterative(Schedule):
    """Prune some, recover, prune more: each round with statistics of what is left.

    Every recovery begins with its full learning rate, which is learning-rate rewinding
    (Renda et al. 2020, arXiv:2003.02389). With ``rewind=weights`` kept weights also go
    back to those of the dense model before each recovery: its masks are what a round
    leaves to the next (Frankle et al. 2019, arXiv:1912.05671). A compressed model's
    earliest checkpoint is the dense model that it came from.
    """

    name = "iterative"
    reference = "Han et al. 2015, arXiv:1506.02626; Renda et al. 2020, arXiv:2003.02389"
    parameters = (
        Parameter("rounds", int, 3, "How often is pruned.", 1, 1000),
        _RAMP,
        Parameter(
            "rewind", str, "none", "What goes back.", choices=("none", "weights")
        ),
    )

    def phases(self, outline: Outline, settings: Settings) -> list[Phase]:
        """Lay out the rounds, with equal shares of the tokens."""
        rounds, rewinds = settings["rounds"], settings["rewind"] == "weights"
        ramp = Ramp(settings["ramp"], final=1.0, end=rounds)
        return [
            Phase(outline.at(ramp.sparsity(number)), 1 / rounds, rewinds)
            for number in range(1, rounds + 1)
        ]


class Gradual(Schedule):
    """Prune in small steps while the model is trained, then train at full sparsity.

    With ``start`` weights settle on the text before anything is pruned.
    """

    name = "gradual"
    reference = "Zhu and Gupta 2017, arXiv:1710.01878, Eq. 1"
    parameters = (
        Parameter("steps", int, 8, "How often is pruned.", 1, 1000),
        _RAMP,
        Parameter("start", float, 0.0, "Share of the tokens before.", 0, 0.9),
        Parameter("end", float, 0.75, "Share of the tokens at its end.", 0.1, 1),
    )

    def check(self, params: Mapping[str, Value]) -> Settings:
        """See that pruning ends after its start."""
        settings = super().check(params)
        start, end = settings["start"], settings["end"]
        if start >= end:
            raise MethodError(
                f"gradual prunes from a start to a later end, found start {start} and "
                f"end {end}"
            )
        return settings

    def phases(self, outline: Outline, settings: Settings) -> list[Phase]:
        """Lay out what comes before, the steps, and what comes after."""
        steps, start, end = settings["steps"], settings["start"], settings["end"]
        ramp = Ramp(settings["ramp"], final=1.0, end=steps)
        part = (end - start) / steps
        phases = [Phase({}, start)] if start else []
        phases += [Phase(outline.at(ramp.sparsity(n)), part) for n in range(1, steps)]
        return [*phases, Phase(outline.pruning, 1.0 - start - part * (steps - 1))]


class Late(Schedule):
    """Train the dense model first, and prune when its weights have settled."""

    name = "late"
    reference = "Zhu and Gupta 2017, arXiv:1710.01878, Sec. 3"
    parameters = (
        Parameter("start", float, 0.25, "Share of the tokens before.", 0.01, 0.99),
    )

    def phases(self, outline: Outline, settings: Settings) -> list[Phase]:
        """Lay out both phases."""
        start = settings["start"]
        return [Phase({}, start), Phase(outline.pruning, 1.0 - start)]


class During(Schedule):
    """Let the recovery prune, by what training tells it, from the dense model on.

    Of the policy only what each layer is to store counts: its sparsity and pattern, not
    the method that would score its weights.
    """

    name = "during"
    reference = "Hoefler et al. 2021, arXiv:2102.00554"
    by_recovery = True

    def phases(self, outline: Outline, settings: Settings) -> list[Phase]:
        """Lay out the one phase."""
        return [Phase(outline.pruning, 1.0, by_recovery=True)]


class Progressive(Schedule):
    """Prune some blocks at a time, and recover before the next ones.

    By ``error`` blocks come first whose weights lose the smallest share of their
    squares, so that what is hardest is done by a model that has had most training.
    """

    name = "progressive"
    reference = "ours"
    parameters = (
        Parameter("stages", int, 3, "In how many parts.", 1, 1000),
        Parameter(
            "order",
            str,
            "error",
            "Which blocks come first.",
            choices=("error", "first", "last"),
        ),
    )

    def phases(self, outline: Outline, settings: Settings) -> list[Phase]:
        """Lay out the stages, with equal shares of the tokens."""
        blocks = list(outline.blocks)
        if settings["order"] == "last":
            blocks.reverse()
        elif settings["order"] == "error":
            errors = outline.errors()
            blocks.sort(key=errors.__getitem__)
        stages = min(settings["stages"], len(blocks)) or 1
        phases = []
        for stage in range(1, stages + 1):
            begun = set(blocks[: len(blocks) * stage // stages])
            layers = [layer for layer in outline.pruning if layer.block in begun]
            phases.append(Phase(outline.at(1.0, layers), 1 / stages))
        return phases


@hookimpl
def register_schedules() -> list[Schedule]:
    """Register them."""
    return [OneShot(), Iterative(), Gradual(), Late(), During(), Progressive()]
