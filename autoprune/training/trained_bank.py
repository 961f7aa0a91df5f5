"""A bank of one policy's variants after its schedule: made by training, and kept."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

from filelock import FileLock

from autoprune.compression.bank import VariantBank
from autoprune.compression.needs import Pairs
from autoprune.compression.shares import ALL, Share
from autoprune.compression.streaming import Progress
from autoprune.errors import PolicyError
from autoprune.models.task import Task
from autoprune.models.text import TokenWindows
from autoprune.policy import Action, Layer, digest
from autoprune.training.carrying import Carrying
from autoprune.training.course import Course

FORMAT = 2
"""Raised when courses are carried out in another way; part of every variant's key."""


@dataclass(eq=False, kw_only=True)
class TrainedBank(VariantBank):
    """A bank whose variants are those of one policy, after its course.

    All of them come of one training, so all are made when one is missing. They lie in
    the store like any others. A process that is killed on the way leaves its
    checkpoints; the next one goes on from there, to the same variants.

    Attributes:
        carrying: What makes them.
    """

    carrying: Carrying

    @classmethod
    def of(
        cls,
        bank: VariantBank,
        actions: Mapping[Layer, Action],
        course: Course,
        *,
        task: Task,
        tokenizer: Any,
        windows: TokenWindows,
    ) -> Self:
        """Open the bank of a policy and a course.

        Args:
            bank: The model, with the variants on dense inputs.
            actions: Of every layer.
            course: How the policy is applied.
            task: What the model is for.
            tokenizer: Its tokenizer.
            windows: What recoveries train on.
        """
        does = {la.name: bank.actions.identity(one) for la, one in actions.items()}
        about = [bank.name, does, course.identity, windows.fingerprint, task.name]
        name = digest([FORMAT, *about])
        folder = bank.store.folder.parent / "recoveries" / name
        carrying = Carrying(
            bank, actions, course, task, tokenizer, windows, folder, name
        )
        shared = {field.name: getattr(bank, field.name) for field in fields(bank)}
        return cls(**shared, carrying=carrying)

    @cached_property
    def name(self) -> str:
        """Fingerprint of all that the variants depend on."""
        return self.carrying.name

    @property
    def schedule(self) -> str:
        """The course, as the policy names it."""
        return self.carrying.course.named

    def key(self, layer: Layer, action: Action) -> str:
        """Name a variant by the training and its layer.

        Raises:
            PolicyError: If the action is not the one that the layer was trained under.
        """
        trained = self.carrying.actions.get(layer)
        if action != trained:
            raise PolicyError(
                f"{layer.name} was trained under {str(trained)!r} and has no variant "
                f"of {str(action)!r}. Open the bank of the policy that is meant."
            )
        return digest([self.name, layer.name])

    def put(self, wanted: Mapping[Layer, Action]) -> int:
        """Put the variants on the model; tell how many layers were rewritten."""
        self.make(wanted.items())  # before: a training takes off what is on the model
        return super().put(wanted)

    def make(
        self,
        wanted: Pairs,
        progress: Progress | None = None,
        share: Share = ALL,
    ) -> int:
        """Carry the course out if a variant is missing; of several processes, one does.

        Args:
            wanted: Layers with their actions.
            progress: Called with thousandths done and to do.
            share: Ignored: a training is of one piece.

        Returns:
            How many variants were made.

        Raises:
            ConfigError: If there is nothing to train, or too little text.
            RunError: If a checkpoint cannot be written.
            StoreError: If variants cannot be written.
        """
        pairs = list(wanted)
        if not self.missing(pairs):
            return 0
        folder = self.carrying.folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not self.missing(pairs):
                return 0
            variants = self.carrying.run(progress)
            for layer, variant in variants.items():
                action = self.carrying.actions[layer]
                about = f"{layer.name}: {action}; {self.schedule}"
                self.store.put(self.key(layer, action), variant, about=about)
            shutil.rmtree(folder, ignore_errors=True)
        return len(variants)
