"""A trial of Ray Tune: a policy that an actor measures, one rung a step."""

import base64
import faulthandler
import json
import math
import sys
import zlib
from collections.abc import Mapping
from typing import Any

from ray import tune

from autoprune.policy import Policy
from autoprune.searching.crew import Measure
from autoprune.searching.remote import RemoteEvaluator
from autoprune.searching.worker import Refused

VALUE, TIME = "kl_of_windows", "windows_seen"
"""What results are compared by at a rung, and the measure of how far they are."""


class PolicyTrainable(tune.Trainable):
    """Measures a policy, one rung a step; keeps its model from trial to trial.

    Its configuration has the ``policy`` and that of the incumbent to be ``near``, both
    packed, the ``windows`` of every step, None for all, and the ``time_limit``.

    Attributes:
        recipe: What it evaluates for; a subclass names it.
        evaluator: What makes the evaluator.
    """

    recipe: Any = None
    evaluator: type[RemoteEvaluator] = RemoteEvaluator

    def setup(self, config: dict[str, Any]) -> None:
        """Load all that evaluating needs. Called by Tune, once an actor."""
        self._remote = self.evaluator()
        self._ready = self._remote.prepare(self.recipe)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next policy. Called by Tune, where an actor is used again."""
        near = new_config["near"]
        self._policy = unpack(new_config["policy"])
        self._near = unpack(near) if near else None
        self._steps = [*new_config["windows"]]
        self._limit = new_config["time_limit"]
        return True

    def step(self) -> dict[str, Any]:
        """Measure on the windows of the next rung; errors are results, too."""
        if isinstance(self._ready, Refused):
            return {"refused": self._ready.error, "done": True}
        job = Measure(self._policy, self._steps.pop(0), self._near)
        # Unlike a thread of ours, it ends also what never lets go of the interpreter.
        faulthandler.dump_traceback_later(
            self._limit, exit=True, file=sys.__stderr__ or sys.stderr
        )
        try:
            done = self._remote.do(job)
        finally:
            faulthandler.cancel_dump_traceback_later()
        if done.error is not None:
            return {"error": done.error, "done": True}
        score, seen = done.result, done.result.windows
        return {
            "score": score,
            "metrics": dict(score.metrics),
            VALUE: sum(seen) / len(seen) if seen else 0.0,
            TIME: len(seen),
            "done": not self._steps or not _finite(score.metrics),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep nothing: a trial that is cut short is measured anew."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing."""


def pack(policy: Policy) -> str:
    """Write a policy shortly: Tune keeps several copies of every configuration.

    Example:
        >>> from autoprune.policy import Action
        >>> policy = Policy({"blocks.0.up": Action.parse("rtn(bits=4)")})
        >>> unpack(pack(policy)) == policy
        True
    """
    plain = json.dumps(policy.to_dict()).encode()
    return base64.b85encode(zlib.compress(plain)).decode()


def unpack(text: str) -> Policy:
    """Read a policy that was packed."""
    return Policy.from_dict(json.loads(zlib.decompress(base64.b85decode(text))))


def _finite(metrics: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in metrics.values())
