"""Schedules and recoveries to choose from, as a search over them sees them.

A text names a course; a list in a parameter stands for a choice. So one text may stand
for many courses, and an Optuna trial draws one of them, choice by choice.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import optuna

from autoprune.errors import ConfigError
from autoprune.policy import Action
from autoprune.training.course import Course

_CHOICE = re.compile(r"([\w-]+)\s*=\s*\[([^\[\]]*)\]")

Parse = Callable[[str], Course]
"""Reads a course from its text; see ``Course.parse``."""


@dataclass(frozen=True, eq=False)
class Family:
    """The courses that one text stands for.

    Attributes:
        text: As it was written.
        choices: Each list in it, by the place and the name of its parameter.
        courses: The course of each combination, by its values in that order.
    """

    text: str
    choices: Mapping[str, tuple[str, ...]]
    courses: Mapping[tuple[str, ...], Course]

    @classmethod
    def parse(cls, text: str, parse: Parse) -> "Family":
        """Read a text with lists.

        Raises:
            PolicyError: If one of its courses has an unknown name.
            MethodError: If a parameter is impossible.
        """
        found = list(_CHOICE.finditer(text))
        choices = {
            f"{place}.{match[1]}": tuple(v.strip() for v in match[2].split(","))
            for place, match in enumerate(found)
        }
        courses = [parse(str(one)) for one in Action.parse_all(text)]
        combinations = product(*choices.values())
        return cls(text, choices, dict(zip(combinations, courses, strict=True)))


@dataclass(frozen=True, eq=False)
class CourseSpace:
    """All courses that a search may carry out.

    Attributes:
        families: One for each text.
    """

    families: tuple[Family, ...]

    @classmethod
    def parse(cls, texts: Sequence[str], parse: Parse) -> "CourseSpace":
        """Read the texts of a configuration.

        Raises:
            ConfigError: If a course trains nothing.
            PolicyError: If one has an unknown name.
            MethodError: If a parameter is impossible.
        """
        families = tuple(Family.parse(text, parse) for text in texts)
        for family in families:
            for course in family.courses.values():
                if not course.tokens:
                    raise ConfigError(
                        f"recovery.schedules: {course.text} trains nothing. Add a "
                        "recovery with tokens, as in "
                        f"{course.schedule.name} + distill(tokens=65536)"
                    )
        return cls(families)

    @property
    def courses(self) -> list[Course]:
        """Every course once, in the order of the texts."""
        known = [c for family in self.families for c in family.courses.values()]
        return list({course.text: course for course in known}.values())

    def suggest(self, trial: optuna.Trial) -> Course:
        """Let an Optuna trial draw a course: a text, then each of its choices."""
        names = [family.text for family in self.families]
        family = self.families[names.index(trial.suggest_categorical("course", names))]
        values = [
            trial.suggest_categorical(f"{family.text} {name}", options)
            for name, options in family.choices.items()
        ]
        return family.courses[tuple(values)]

    def params(self, course: Course) -> dict[str, str]:
        """Tell what a trial draws for a course; the inverse of ``suggest``."""
        for family in self.families:
            for values, known in family.courses.items():
                if known.text == course.text:
                    names = [f"{family.text} {name}" for name in family.choices]
                    drawn = dict(zip(names, values, strict=True))
                    return {"course": family.text, **drawn}
        raise ConfigError(f"{course.text} is none of the courses to choose from")

    def distributions(
        self, params: Mapping[str, str]
    ) -> dict[str, optuna.distributions.BaseDistribution]:
        """Give what the parameters of a trial were drawn from."""
        texts = tuple(family.text for family in self.families)
        options = {"course": texts}
        for family in self.families:
            for name, values in family.choices.items():
                options[f"{family.text} {name}"] = values
        return {
            name: optuna.distributions.CategoricalDistribution(options[name])
            for name in params
        }


def shortened(course: Course, share: float, parse: Parse) -> Course:
    """Give the course that trains on a share of its tokens, rounded up.

    Args:
        course: A course.
        share: In (0, 1].
        parse: Reads one.
    """
    action = Action.parse(course.text)
    steps = []
    for step in action.steps:
        given = dict(step.params)
        if "tokens" in given:
            given["tokens"] = math.ceil(float(given["tokens"]) * share)
        steps.append(replace(step, params=tuple(sorted(given.items()))))
    return parse(str(Action(tuple(steps))))
