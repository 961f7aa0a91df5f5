"""Courses with choices, as a search over them sees them."""

import optuna
import pytest
from autoprune_plugins import adapters, recoveries
from autoprune_plugins.schedules import register_schedules

from autoprune.errors import ConfigError, MethodError, PolicyError
from autoprune.searching.courses import CourseSpace, shortened
from autoprune.training.course import Course

TEXTS = [
    "one-shot + blockwise(tokens=64)",
    "iterative(rounds=[2, 4]) + distill(tokens=128, learning_rate=[0.1, 0.01])",
]


def parse(text: str) -> Course:
    schedules = {one.name: one for one in register_schedules()}
    known = {
        one.name: one
        for plugin in (adapters, recoveries)
        for one in plugin.register_recoveries()
    }
    return Course.parse(text, schedules, known)


def test_lists_stand_for_choices() -> None:
    assert [course.text for course in CourseSpace.parse(TEXTS, parse).courses] == [
        "one-shot + blockwise(tokens=64)",
        "iterative(rounds=2) + distill(learning_rate=0.1, tokens=128)",
        "iterative(rounds=2) + distill(learning_rate=0.01, tokens=128)",
        "iterative(rounds=4) + distill(learning_rate=0.1, tokens=128)",
        "iterative(rounds=4) + distill(learning_rate=0.01, tokens=128)",
    ]


def test_a_trial_draws_every_course_and_can_be_told_of_it() -> None:
    space = CourseSpace.parse(TEXTS, parse)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = {}
    for _ in range(60):
        trial = study.ask()
        course = space.suggest(trial)
        seen[course.text] = trial.params
        assert space.params(course) == trial.params
        assert space.distributions(trial.params) == trial.distributions
    assert set(seen) == {course.text for course in space.courses}


def test_the_same_course_of_two_texts_stands_once() -> None:
    twice = CourseSpace.parse([TEXTS[0], TEXTS[0] + " "], parse)
    assert len(twice.courses) == 1


@pytest.mark.parametrize(
    ("share", "tokens"), [(1.0, 128), (0.25, 32), (0.3, 39), (1e-6, 1)]
)
def test_a_course_is_shortened(share: float, tokens: int) -> None:
    short = shortened(parse("iterative + distill(tokens=128)"), share, parse)
    assert short.text == f"iterative + distill(tokens={tokens})"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("iterative", ConfigError, "iterative trains nothing. Add a recovery"),
        ("one-shot + lara(tokens=[1, 2])", PolicyError, "Did you mean 'lora'"),
        ("iterative(rounds=[0, 1]) + lora(tokens=9)", MethodError, "lies from 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    text: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        CourseSpace.parse([text], parse)
