"""What runs in workers that load no model, nor anything of ours that is heavy.

What their driver gives out is in ``toy_orders``.
"""

import os
import signal
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from autoprune.errors import RunError
from autoprune.searching.remote import RemoteEvaluator
from autoprune.searching.worker import Done, Ready


@dataclass(frozen=True)
class PlainRecipe:
    """A recipe, as it reaches a worker."""

    fingerprint: Mapping[str, Any]


@dataclass(frozen=True)
class PlainJob:
    """A job, as it reaches a worker."""

    kind: str
    gives: Any

    def run(self, evaluator: Any) -> Any:
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "exit":
            sys.exit(7)
        elif self.kind == "sleep":
            time.sleep(self.gives)
        elif self.kind == "raise":
            raise ValueError(self.gives)
        elif self.kind == "environment":
            return dict(os.environ)
        return self.gives


class Light(RemoteEvaluator):
    """An evaluator that is ready at once."""

    def make(self, recipe: Any) -> Any:
        return recipe


class Dying(RemoteEvaluator):
    """An evaluator that dies while it loads."""

    def make(self, recipe: Any) -> Any:
        os._exit(7)


class Differing(RemoteEvaluator):
    """An evaluator that refuses, but for the first on a machine."""

    def make(self, recipe: Any) -> Any:
        try:
            os.close(os.open(recipe.fingerprint["path"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise RunError("the worker differs from the driver") from None
        return recipe


class Stuck(RemoteEvaluator):
    """An evaluator that never has loaded."""

    def make(self, recipe: Any) -> Any:
        time.sleep(3600)


class Elsewhere(RemoteEvaluator):
    """An evaluator on a machine whose cache is another one."""

    def make(self, recipe: Any) -> Any:
        os.environ["AUTOPRUNE_CACHE"] += "/elsewhere"
        return super().make(recipe)


class Sharing(RemoteEvaluator):
    """An evaluator of shares that wait for each other, as those of variants do.

    It dies of the second of two where the recipe says so.
    """

    def make(self, recipe: Any) -> Any:
        return _Sharer(**recipe.fingerprint)


@dataclass(frozen=True)
class _Sharer:
    path: str
    fatal: bool = False

    def make(self, share: Any) -> int:
        if self.fatal and (share.index, share.of) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        folder = Path(self.path)
        (folder / f"{share.index} of {share.of}").touch()
        time.sleep(1.0)
        while len(list(folder.glob(f"* of {share.of}"))) < share.of:
            time.sleep(0.05)
        return 1


class Instant(RemoteEvaluator):
    """An evaluator that gives a number at once, from the policy alone."""

    def make(self, recipe: Any) -> Any:
        return self

    def measure(self, policy: Any, windows: Any = None, *, near: Any = None) -> Any:
        from autoprune.searching.trial import Score

        return Score({"kl": zlib.crc32(policy.fingerprint.encode()) / 2**32})


def serve() -> None:
    """Serve a ``ProcessCrew`` from a process that loads nothing."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[-1]))
    evaluator = Instant()
    connection.recv()
    connection.send(Ready())
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(Done(job.run(evaluator)))
