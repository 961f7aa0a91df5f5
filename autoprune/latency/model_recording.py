"""Times whole models into a journal: on a CPU side by side, on a GPU one by one."""

import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from autoprune.errors import ProfileError
from autoprune.latency.comparing import Comparison, compare
from autoprune.latency.journal import Journal
from autoprune.latency.kernels import Kernel
from autoprune.latency.model_running import build_model, pass_of, tune
from autoprune.latency.profiles import Point
from autoprune.latency.recording import OK, Deadline, Tell, timed
from autoprune.latency.running import generator_on
from autoprune.latency.timing import Call, CudaTimer, Timing
from autoprune.latency.whole_models import Step, variation_of

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

EAGER = "eager_"
"""What the operation of a pass begins with that no graph holds."""


class ModelRecorder:
    """Times passes of whole models.

    Args:
        kind: ``cuda`` or ``cpu``.
        journal: Where points go; its products' points tell the best algorithms.
        tell: Is told of progress.
        rounds: On a CPU, rounds of a comparison.
        batch_ms: On a CPU, how long a model's turn takes at least.
        seed: Of all chance.
    """

    def __init__(
        self,
        kind: str,
        journal: Journal,
        *,
        tell: Tell = lambda _: None,
        rounds: int = 7,
        batch_ms: float = 50.0,
        seed: int = 0,
    ) -> None:
        self.kind, self.journal, self._tell = kind, journal, tell
        self._rounds, self._batch_ms, self._seed = rounds, batch_ms, seed
        self._generator = generator_on(kind, seed)
        self._order = 1 + max((p.order for p in journal.points.values()), default=0)

    def run(self, plan: Sequence[Point], deadline: Deadline) -> bool:
        """Time what a plan of whole models has that is not done yet.

        Args:
            plan: Points; those of one model in a row, its dense variation first.
            deadline: No model is begun after it.

        Returns:
            True if all points are done.
        """
        todo = [point for point in plan if not self.journal.done(point)]
        for _, points in groupby(todo, key=_model_of):
            group = list(points)
            if deadline.left() <= 0:
                return False
            if self.kind == "cpu":
                left = [point for point in group if not self._given_up(point)]
                if left:
                    self._compare_all(left, plan, deadline)
            elif not self._time_each(group, deadline):
                return False
        return all(self.journal.done(point) for point in plan)

    def _time_each(self, group: Sequence[Point], deadline: Deadline) -> bool:
        timer = CudaTimer(replay_ms=4.0)
        for _, points in groupby(group, key=lambda point: point.kernel):
            own = [point for point in points if not self._given_up(point)]
            if deadline.left() <= 0:
                return False
            if own:
                self._tell(own[0].kernel)
                self._time_variation(own, timer, deadline)
            gc.collect()
            torch.cuda.empty_cache()
        return True

    def _time_variation(
        self, points: Sequence[Point], timer: CudaTimer, deadline: Deadline
    ) -> None:
        self.journal.begin(points[0])
        try:
            model = build_model(variation_of(points[0]), self.kind, self._generator)
        except (RuntimeError, ProfileError) as error:
            for point in points:
                self._keep(point, None, str(error).partition("\n")[0][:300])
            return
        for point in points:
            if deadline.left() <= 0:
                return
            if point is not points[0]:
                self.journal.begin(point)
            tune(model, point.m, self._best_algorithm)
            try:
                call = pass_of(model, _step_of(point), self._generator)
                timing = timer.time([call])
                eager = timer.eager([call], count=2)
            except RuntimeError as error:
                torch.cuda.synchronize()  # a lost GPU is raised here again
                self._keep(point, None, str(error).partition("\n")[0][:300])
                continue
            status = OK if timing.way == "graph" else timing.why
            self._keep(point, timing, status)
            op = EAGER + point.op.removeprefix("model_")
            self._keep(replace(point, op=op), eager, OK)

    def _compare_all(
        self, group: Sequence[Point], plan: Sequence[Point], deadline: Deadline
    ) -> None:
        """Build all variations at once, and pass them in turns, step by step."""
        dense = next(p for p in plan if _model_of(p) == _model_of(group[0]))
        first = {point.kernel: point for point in reversed([dense, *group])}
        self._tell(f"building {len(first) + 1} models like {dense.kernel}")
        self.journal.begin(group[0])
        models = {
            name: built
            for name, point in first.items()
            if (built := self._built(point, group)) is not None
        }
        double = build_model(variation_of(dense), self.kind, self._generator)
        for step, points in _by_step(group).items():
            left = deadline.left()
            if left <= 0:
                return
            own = [point for point in points if point.kernel in models]
            self._tell(f"{step.op} of {len(own)} models, {step.tokens} tokens")
            names = dict.fromkeys([dense.kernel, *(point.kernel for point in own)])
            calls: dict[str, Call] = {
                name: pass_of(models[name], step, self._generator) for name in names
            }
            result = compare(
                calls,
                double=pass_of(double, step, self._generator),
                rounds=self._rounds,
                batch_ms=self._batch_ms,
                seconds=left,
                seed=self._seed,
            )
            for point in own:
                self._keep_compared(point, result)

    def _built(self, point: Point, group: Sequence[Point]) -> "LlamaForCausalLM | None":
        """Build a variation; None if it cannot be, which its points then say."""
        try:
            return build_model(variation_of(point), self.kind, self._generator)
        except (RuntimeError, ProfileError) as error:
            for one in group:
                if one.kernel == point.kernel:
                    self._keep(one, None, str(error).partition("\n")[0][:300])
            return None

    def _keep_compared(self, point: Point, result: Comparison) -> None:
        against = result.found[point.kernel]
        extra = {
            "ratio": round(against.ratio, 4),
            "interval": [round(against.low, 4), round(against.high, 4)],
            "a_a": round(result.a_a, 4),
            "noisy": result.noisy,
            "rounds": result.rounds,
        }
        note = json.dumps(json.loads(point.note) | extra, sort_keys=True)
        self._keep(replace(point, note=note), against.timing, OK)

    def _given_up(self, point: Point) -> bool:
        if self.journal.given_up(point):
            self._keep(point, None, "the process died while it was timed, twice")
            return True
        return False

    def _keep(self, point: Point, timing: Timing | None, status: str) -> None:
        found = replace(point, order=self._order, status=status)
        if timing is not None and status == OK:
            found = timed(found, timing)
        self._order += 1
        self.journal.add(found)

    def _best_algorithm(self, kernel: Kernel, n: int, k: int, m: int) -> int:
        """Give the algorithm of the nearest product that was recorded; else 0."""
        known = [
            point
            for point in self.journal.points.values()
            if point.ok and point.kernel == kernel.name and point.algorithm >= 0
        ]

        def distance(point: Point) -> float:
            pairs = ((point.m, m), (point.n, n), (point.k, k))
            return sum(abs(math.log2(a / b)) for a, b in pairs)

        return min(known, key=distance).algorithm if known else 0


def _model_of(point: Point) -> str:
    found: str = json.loads(point.note)["model"]
    return found


def _step_of(point: Point) -> Step:
    return Step(point.op, point.batch, point.context)


def _by_step(points: Sequence[Point]) -> Mapping[Step, list[Point]]:
    found: dict[Step, list[Point]] = {}
    for point in points:
        found.setdefault(_step_of(point), []).append(point)
    return found
