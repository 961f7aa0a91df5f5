"""A course is read from its text, and refused by name."""

import pytest
from autoprune_plugins import adapters, recoveries
from autoprune_plugins.schedules import register_schedules

from autoprune.errors import AutoPruneError, MethodError, PolicyError
from autoprune.training.course import Course

SCHEDULES = {one.name: one for one in register_schedules()}
RECOVERIES = {
    one.name: one
    for plugin in (adapters, recoveries)
    for one in plugin.register_recoveries()
}


def parse(text: str) -> Course:
    return Course.parse(text, SCHEDULES, RECOVERIES)


def test_what_repeats_a_default_is_left_out() -> None:
    named = "iterative(rounds=3, ramp=linear) + lora(tokens=64, rank=16)"
    course = parse(named)
    assert course.text == "iterative(ramp=linear) + lora(tokens=64)"
    assert course.named == named
    assert course.settings == {"rounds": 3, "ramp": "linear", "rewind": "none"}
    assert course.recoveries[0][1]["rank"] == 16
    assert course.tokens == 64
    assert parse(course.text).identity == course.identity


def test_several_recoveries_follow_each_other() -> None:
    course = parse("one-shot + blockwise(tokens=32) + finetune(tokens=64)")
    assert [one.name for one, _ in course.recoveries] == ["blockwise", "finetune"]
    assert course.tokens == 96


def test_versions_are_part_of_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    before = parse("one-shot + lora(tokens=64)").identity
    monkeypatch.setattr(type(RECOVERIES["lora"]), "version", "2")
    assert parse("one-shot + lora(tokens=64)").identity != before


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("one-shoot", PolicyError, "unknown schedule 'one-shoot'. Did you mean 'one-s"),
        ("dense", PolicyError, "unknown schedule 'dense'"),
        (
            "lora(tokens=64)",
            PolicyError,
            "stands behind a schedule, as in one-shot . l",
        ),
        ("one-shot + lara(tokens=64)", PolicyError, "unknown recovery 'lara'. Did you"),
        ("one-shot + lora", MethodError, "lora needs tokens=... "),
        ("one-shot + lora(tokens=0)", MethodError, r"lora\(tokens=...\) lies from 1"),
        ("iterative(round=2)", MethodError, "unknown parameter of iterative 'round'"),
        ("one-shot + lora(", PolicyError, "cannot read"),
        ("gradual(start=0.5, end=0.5)", MethodError, "found start 0.5 and end 0.5"),
        (
            "one-shot + distill(tokens=9, divergence=0.0)",
            MethodError,
            "distill: a loss needs a weight above 0",
        ),
        (
            "one-shot + lora(tokens=9, temperature=0.0)",
            MethodError,
            "lora: the temperature of a distillation is above 0, found 0.0",
        ),
        ("one-shot + lora(tokens=9, l1=1.0)", MethodError, "of lora 'l1'"),
    ],
)
def test_what_is_no_course_is_refused(
    text: str, kind: type[AutoPruneError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        parse(text)
