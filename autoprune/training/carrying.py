"""Carries a course out: prune, recover with the masks held, and so on; then quantize.

It is done on a copy of the model. After each phase what has been trained counts as the
weights that the next phase finds, so every method serves every schedule: what was
pruned before is zero, scores nothing, and goes first.
"""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.compression.bank import VariantBank
from autoprune.compression.storage import Storage
from autoprune.compression.store import VariantStore
from autoprune.compression.streaming import Progress
from autoprune.compression.variant import Variant
from autoprune.errors import ConfigError
from autoprune.models.computing import compute_in
from autoprune.models.task import Task
from autoprune.models.text import TokenWindows
from autoprune.models.weights import write_weight
from autoprune.policy import Action, Layer, digest
from autoprune.training.as_trained import (
    TRAINED,
    AsTrained,
    OwnModel,
    as_trained,
    check_kept,
)
from autoprune.training.course import Course
from autoprune.training.goals import UNITS, Goal
from autoprune.training.in_turn import KEPT_BYTES, recover_in_turn
from autoprune.training.masks import FrozenMasks
from autoprune.training.recovery import Pupil, Told
from autoprune.training.resuming import check_room
from autoprune.training.schedule import Phase, Pruning

HELD_OUT = 8
"""One window of so many judges, where a recovery judges itself."""


@dataclass(frozen=True, eq=False)
class Carrying:
    """One policy on its way through a course.

    Attributes:
        bank: The model and its variants on dense inputs.
        actions: Of every layer.
        course: The schedule and its recoveries.
        task: What the model is for.
        tokenizer: Its tokenizer.
        windows: What is trained on.
        folder: For what a killed process leaves to the next one.
        name: Of the result, by all that it depends on.
    """

    bank: VariantBank
    actions: Mapping[Layer, Action]
    course: Course
    task: Task
    tokenizer: Any
    windows: TokenWindows
    folder: Path
    name: str

    def run(self, progress: Progress | None = None) -> dict[Layer, Variant]:
        """Carry the course out; the model itself is dense afterwards.

        Args:
            progress: Called with thousandths done and to do.

        Returns:
            The variant of every layer that the policy compresses.

        Raises:
            ConfigError: If there is a recovery, but nothing that it could train, or
                too little text.
            RunError: If the disk has no room for checkpoints.
        """
        self._check()
        student = self._copy()
        made: dict[Layer, Variant] = {}
        for number, phase in enumerate(self.phases):
            made = self._phase(student, number, phase, progress)
        shutil.rmtree(self.folder / "variants", ignore_errors=True)
        found = {layer: as_trained(student, layer, one) for layer, one in made.items()}
        return found | self._rest(student, found)

    @cached_property
    def phases(self) -> list[Phase]:
        """What is done, in order."""
        return self.course.phases(self.actions, self.bank.actions, self._errors)

    @cached_property
    def _cut(self) -> tuple[Layer, ...]:
        """The layers that have lost units at the end."""
        storage = self.bank.actions.storage
        goals = {
            layer: Goal.of(layer, storage(layer, action))
            for layer, action in self.phases[-1].pruning.items()
        }
        return tuple(la for la, goal in goals.items() if goal and goal.pattern == UNITS)

    def _errors(self, pruning: Pruning) -> dict[int | None, float]:
        """Tell what share of its squares each block loses under variants of dense."""
        removed: dict[int | None, float] = {}
        whole: dict[int | None, float] = {}
        self.bank.make(pruning.items())
        for layer, action in pruning.items():
            dense = self._dense(layer)
            lost = dense - self.bank.get(layer, action).weight.float()
            part, size = float(lost.square().sum()), float(dense.square().sum())
            removed[layer.block] = removed.get(layer.block, 0.0) + part
            whole[layer.block] = whole.get(layer.block, 0.0) + size
        return {block: removed[block] / whole[block] for block in removed}

    def _check(self) -> None:
        if not self.course.recoveries:
            return
        if not self.phases[-1].pruning:
            raise ConfigError(
                f"{self.course.text} has nothing to train: the policy prunes no layer "
                "before it quantizes it. Take one-shot without a recovery."
            )
        if len(self.windows.ids) < 2:
            raise ConfigError(
                f"a recovery trains on some windows and is judged by others, found "
                f"{len(self.windows.ids)}. Give more in text.recovery."
            )
        weights = sum(layer.numel for layer in self.phases[-1].pruning)
        recoveries = [recovery for recovery, _ in self.course.recoveries]
        largest = max(recovery.checkpoint_bytes for recovery in recoveries)
        kept = KEPT_BYTES * len(self.phases) * len(recoveries)
        check_room(self.folder, weights * (largest + kept))

    def _copy(self) -> nn.Module:
        """Copy the dense model, float32, with weights as exact as they are stored."""
        stitched = self.bank.stitched
        stitched.restore()
        student = copy.deepcopy(stitched.model)
        compute_in(student, torch.float32)
        for layer in stitched.layers:
            write_weight(student, layer, stitched.dense_weight(layer))
        return student

    def _phase(
        self,
        student: nn.Module,
        number: int,
        phase: Phase,
        progress: Progress | None,
    ) -> dict[Layer, Variant]:
        """Prune the student and train it; give what is on it then."""
        put = {} if phase.by_recovery else self._put(student, number, phase)
        storage = self.bank.actions.storage
        storages = {la: storage(la, action) for la, action in phase.pruning.items()}
        masks = FrozenMasks(student, self._kept(storages, put))

        def told(share: float) -> None:
            if progress:
                progress(round(1000 * (number + share) / len(self.phases)), 1000)

        told(0.0)
        if phase.share:
            self._recover(student, number, phase.share, masks, storages, told)
        masks.check()
        told(1.0)
        made = {}
        for layer, declared in storages.items():
            pruned = masks.of(layer)
            kept = None if pruned is None else ~pruned
            made[layer] = replace(put.get(layer, Variant(declared)), mask=kept)
            check_kept(layer, made[layer], self.course.text)
        return made

    def _put(
        self, student: nn.Module, number: int, phase: Phase
    ) -> dict[Layer, Variant]:
        """Prune the student by the methods of the policy."""
        bank = self._bank_on(student, number, phase.pruning)
        bank.put(phase.pruning)
        put = {layer: bank.get(layer, one) for layer, one in phase.pruning.items()}
        for layer, variant in put.items():
            if phase.rewinds and variant.mask is not None:
                kept = torch.where(variant.mask, self._dense(layer), 0.0)
                write_weight(student, layer, kept)
        return put

    @staticmethod
    def _kept(
        storages: Mapping[Layer, Storage], put: Mapping[Layer, Variant]
    ) -> dict[Layer, Tensor]:
        """Tell what stays of each layer that loses weights, now or in the recovery."""
        if put:
            return {la: one.mask for la, one in put.items() if one.mask is not None}
        return {
            layer: torch.ones(layer.shape, dtype=torch.bool)
            for layer, declared in storages.items()
            if declared.mask is not None
        }

    def _bank_on(
        self, student: nn.Module, number: int, reference: Mapping[Layer, Action]
    ) -> VariantBank:
        """Open a bank on the student as it is, with inputs that its own blocks give."""
        # Nobody writes to a weight that the store's memory or another bank shares.
        stitched = OwnModel(student, self.bank.stitched.layers)
        bank = replace(self.bank, stitched=stitched, reference=reference)
        if not number:  # the dense model: what was made of it for others serves
            return bank
        store = VariantStore(self.folder / "variants", self.bank.store.cap_bytes)
        return replace(bank, store=store, revision=digest([self.name, number]))

    def _recover(
        self,
        student: nn.Module,
        number: int,
        share: float,
        masks: FrozenMasks,
        storages: Mapping[Layer, Storage],
        told: Told,
    ) -> None:
        """Do the recoveries of a phase."""
        held = max(1, len(self.windows.ids) // HELD_OUT)
        pupil = Pupil(
            model=student,
            dense=self.bank.stitched.model,
            inventory=self.bank.inventory,
            layers=tuple(self.phases[-1].pruning),
            masks=masks,
            storages=storages,
            cut=self._cut,
            task=self.task,
            tokenizer=self.tokenizer,
            windows=self.windows.ids[:-held],
            validation=self.windows.ids[-held:],
        )
        recover_in_turn(
            pupil,
            self.course.recoveries,
            self.folder / f"phase-{number}",
            share=share,
            where=f"phase {number + 1} of {len(self.phases)} of {self.course.text}",
            told=told,
        )

    def _rest(
        self, student: nn.Module, trained: Mapping[Layer, Variant]
    ) -> dict[Layer, Variant]:
        """Do the steps that come after the training, on statistics taken anew."""
        pruning = self.phases[-1].pruning
        wanted: dict[Layer, Action] = {}
        for layer, action in self.actions.items():
            if layer in trained:
                left = action.steps[len(pruning[layer].steps) :]
                wanted[layer] = Action((TRAINED, *left))
            elif action.steps:
                wanted[layer] = action
        rest = {la: one for la, one in wanted.items() if one.steps != (TRAINED,)}
        if not rest:
            return {}
        methods = {**self.bank.actions.methods, TRAINED.method: AsTrained(trained)}
        meaning = replace(self.bank.actions, methods=methods)
        bank = replace(self._bank_on(student, -1, wanted), actions=meaning)
        bank.make(wanted.items())
        found = {layer: bank.get(layer, action) for layer, action in rest.items()}
        shutil.rmtree(self.folder / "variants", ignore_errors=True)
        return found

    def _dense(self, layer: Layer) -> Tensor:
        return self.bank.stitched.dense_weight(layer).float()
