"""A schedule with the recoveries between its phases, as a policy names them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from autoprune.compression.actions import Actions
from autoprune.compression.parameters import Settings
from autoprune.errors import PolicyError, unknown_name
from autoprune.policy import Action, Layer, Step
from autoprune.training.recovery import RecoveryMethod
from autoprune.training.schedule import Outline, Phase, Pruning, Schedule, pruning_of


@dataclass(frozen=True, eq=False)
class Course:
    """How a policy is applied: ``iterative(rounds=3) + lora(rank=8, tokens=65536)``.

    Attributes:
        schedule: Lays out the phases.
        settings: Its complete parameters.
        recoveries: What comes after each phase, in order, with complete parameters.
        named: As it was named.
        text: Says the same, without what only repeats a default.
    """

    schedule: Schedule
    settings: Settings
    recoveries: tuple[tuple[RecoveryMethod, Settings], ...]
    named: str
    text: str

    @classmethod
    def parse(
        cls,
        text: str,
        schedules: Mapping[str, Schedule],
        recoveries: Mapping[str, RecoveryMethod],
    ) -> "Course":
        """Read a course from its text.

        Args:
            text: A schedule, and what recovers after each of its phases.
            schedules: All there are, by name.
            recoveries: All there are, by name.

        Raises:
            PolicyError: If a name is unknown; lists near misses.
            MethodError: If a parameter is unknown, missing or impossible.
        """
        first, *others = Action.parse(text).steps or (Step("dense"),)
        if first.method not in schedules:
            hint = "A recovery stands behind a schedule, as in one-shot + "
            told = unknown_name("schedule", first.method, schedules)
            known = first.method in recoveries
            raise PolicyError(f"{told}. {hint}{first.method}" if known else told)
        schedule, found = schedules[first.method], []
        settings = schedule.check(dict(first.params))
        steps = [_plain(schedule, settings)]
        for step in others:
            if step.method not in recoveries:
                raise PolicyError(unknown_name("recovery", step.method, recoveries))
            recovery = recoveries[step.method]
            found.append((recovery, recovery.check(dict(step.params))))
            steps.append(_plain(*found[-1]))
        _check_who_prunes(schedule, [one for one, _ in found], recoveries)
        return cls(schedule, settings, tuple(found), text, str(Action(tuple(steps))))

    @property
    def identity(self) -> str:
        """Name it with the versions of what it is made of, for keys."""
        versions = [self.schedule.version, *(one.version for one, _ in self.recoveries)]
        return f"{self.text} @ {' '.join(versions)}"

    @property
    def tokens(self) -> int:
        """How many tokens are trained on in all; 0 where nothing says so."""
        return sum(settings.get("tokens") or 0 for _, settings in self.recoveries)

    def phases(
        self,
        actions: Mapping[Layer, Action],
        meaning: Actions,
        errors: Callable[[Pruning], Mapping[int | None, float]],
    ) -> list[Phase]:
        """Lay out what is done to a policy.

        Args:
            actions: Of every layer.
            meaning: What actions mean.
            errors: Tells what pruning removes of each block; see ``Outline.errors``.
        """
        begun = {la: pruning_of(la, action, meaning) for la, action in actions.items()}
        pruning = {layer: action for layer, action in begun.items() if action.steps}
        outline = Outline(pruning, meaning, partial(errors, pruning))
        return self.schedule.phases(outline, self.settings)


def _check_who_prunes(
    schedule: Schedule,
    found: Sequence[RecoveryMethod],
    known: Mapping[str, RecoveryMethod],
) -> None:
    """See that the recovery prunes if the schedule leaves it to that, and only then."""
    first, others = found[:1], found[1:] if schedule.by_recovery else found
    if schedule.by_recovery and not any(one.prunes for one in first):
        able = sorted(name for name, one in known.items() if one.prunes)
        raise PolicyError(
            f"in {schedule.name} the recovery prunes, found "
            f"{first[0].name if first else 'none'}, which cannot. Take one of: "
            f"{', '.join(able)}."
        )
    if wrong := [one.name for one in others if one.from_dense]:
        raise PolicyError(
            f"{wrong[0]} prunes a dense model, but stands where {schedule.name} has "
            f"pruned it. Write during + {wrong[0]}(...)."
        )


def _plain(whose: Schedule | RecoveryMethod, settings: Settings) -> Step:
    """Write settings as a step, without what only repeats a default."""
    defaults = {one.name: one.default for one in whose.parameters}
    kept = {name: value for name, value in settings.items() if value != defaults[name]}
    return Step(whose.name, tuple(sorted(kept.items())))
