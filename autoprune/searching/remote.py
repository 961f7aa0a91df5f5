"""An evaluator far away: what runs in an actor of Ray. Heavy imports are late."""

import logging
import os
import platform
import traceback
from typing import Any

from autoprune.searching.worker import Done, Ready, Refused, sendable

log = logging.getLogger(__name__)


class RemoteEvaluator:
    """Keeps model, variants and teacher from one job to the next.

    What it raises it gives back: then another process learns it as it was.
    """

    def __init__(self) -> None:
        self._kitchen: Any = None
        self._evaluator: Any = None

    def where(self) -> str:
        """Tell which process this is, and on which machine."""
        return f"process {os.getpid()} on {platform.node()}"

    def prepare(self, recipe: Any) -> Ready | Refused:
        """Make the evaluator that a recipe describes."""
        try:
            self._evaluator = self.make(recipe)
        except Exception as error:
            return Refused(told(error, self.where()))
        return Ready()

    def make(self, recipe: Any) -> Any:
        """Make an evaluator; the model stays loaded from one to the next."""
        import torch

        from autoprune.searching.memory_limit import hold_memory
        from autoprune.searching.recipe import Kitchen

        # Ray sets OMP_NUM_THREADS by the processors that were asked for.
        torch.set_num_threads(recipe.threads)
        if recipe.memory is not None:
            hold_memory(recipe.memory)
        self._kitchen = self._kitchen or Kitchen()
        return self._kitchen.make(recipe)

    def do(self, job: Any) -> Done:
        """Do a job."""
        try:
            return Done(job.run(self._evaluator))
        except Exception as error:
            return Done(error=told(error, self.where()))


def told(error: Exception, where: str) -> Exception:
    """Make an error fit to be sent, with a note of where it was raised."""
    lines = "".join(traceback.format_exception(error))
    told = sendable(error)
    told.add_note(f"It was raised in {where}:\n{lines}")
    return told
