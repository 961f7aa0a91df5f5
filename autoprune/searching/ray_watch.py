"""Looks after an experiment of Ray Tune: what is lost, what finds no place, its end."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune

from autoprune.errors import RunError
from autoprune.searching.ray_causes import cause_of
from autoprune.searching.ray_cluster import Cluster
from autoprune.searching.ray_engine import LOOK_S, PLACE_S
from autoprune.searching.ray_searcher import PolicySearcher

log = logging.getLogger(__name__)


class Watch(tune.Callback):
    """Tells a searcher of trials that were lost, and of those that find no place."""

    def __init__(self, searcher: PolicySearcher, cluster: Cluster) -> None:
        self._searcher = searcher
        self._cluster = cluster
        self._placed = time.monotonic()

    def on_trial_error(
        self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any
    ) -> None:
        """Hear that a trial's actor is gone. Called by Tune."""
        said = Path(trial.error_file).read_text() if trial.error_file else ""
        self._searcher.lose(trial.trial_id, cause_of(RuntimeError(said)))

    def on_step_end(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
        """Look whether trials find no place. Called by Tune, ten times a second."""
        waits = {trial.status for trial in trials[-1024:]} & {"PENDING", "RUNNING"}
        if waits != {"PENDING"}:
            self._placed = time.monotonic()
        elif time.monotonic() - self._placed > PLACE_S:
            self._searcher.error = RunError(
                f"{self._cluster.name} had no place for a trial in {PLACE_S:.0f} s: "
                f"its nodes have {self._cluster.resources()} in all"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Enough(tune.Stopper):
    """Ends an experiment once its searcher met an error."""

    def __init__(self, searcher: PolicySearcher) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Leave trials to the scheduler."""
        return False

    def stop_all(self) -> bool:
        """Tell whether all is to end."""
        return self._searcher.error is not None

    def __getstate__(self) -> dict[str, Any]:
        return {}


@contextmanager
def watched(cluster: Cluster) -> Iterator[None]:
    """Have it told if the head goes: Tune waits for it until Ray ends the process."""
    over = threading.Event()

    def watch() -> None:
        try:
            while not over.wait(LOOK_S):
                cluster.answers()
        except RunError as error:
            log.error("%s", error)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
