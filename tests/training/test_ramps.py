"""Ramps against their formulas, and at their exact ends."""

import math
from fractions import Fraction

import pytest

from autoprune.errors import ConfigError
from autoprune.training.ramps import RAMPS, Ramp


@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize(
    ("start", "end", "interval"), [(0, 0, 1), (0, 10, 1), (7, 100, 9), (3, 4, 50)]
)
@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.7), (0.1, 0.9), (0.3, 0.3)])
def test_ends_are_exact_and_it_never_falls(
    kind: str, start: int, end: int, interval: int, initial: float, final: float
) -> None:
    ramp = Ramp(kind, initial, final, start, end, interval)
    found = [ramp.sparsity(step) for step in range(end + 3)]
    assert found == sorted(found)
    assert set(found[:start]) <= {initial}
    assert set(found[end:]) == {final}
    assert all(initial <= value <= final for value in found)
    for step in range(1, len(found)):
        if found[step] != found[step - 1]:
            assert ramp.prunes_at(step), step


def test_cubic_is_equation_1_of_zhu_and_gupta() -> None:
    # 100 prunings, each 10 steps after the one before, from step 50 on.
    initial, final, start, count, interval = 0.25, 0.875, 50, 100, 10
    ramp = Ramp("cubic", initial, final, start, start + count * interval, interval)
    for index in range(count + 1):
        step = start + index * interval
        left = 1 - Fraction(step - start, count * interval)
        exact = Fraction(final) + (Fraction(initial) - Fraction(final)) * left**3
        assert ramp.sparsity(step) == pytest.approx(float(exact), abs=1e-15)
        assert ramp.prunes_at(step)
        if index < count:  # nothing happens between two prunings
            between = range(step, step + interval)
            assert len({ramp.sparsity(one) for one in between}) == 1
            assert [one for one in between if ramp.prunes_at(one)] == [step]


def test_shapes_by_hand() -> None:
    def halfway(kind: str) -> float:
        return Ramp(kind, 0.0, 0.8, 0, 10).sparsity(5)

    assert halfway("constant") == 0.8
    assert halfway("linear") == pytest.approx(0.4)
    assert halfway("cubic") == pytest.approx(0.7)
    exponential = 0.8 * (1 - math.exp(-2.5)) / (1 - math.exp(-5))
    assert halfway("exponential") == pytest.approx(exponential)


def test_exponential_closes_the_same_share_at_every_step() -> None:
    ramp = Ramp("exponential", 0.0, 0.8, 0, 20)
    grown = [ramp.sparsity(s + 1) - ramp.sparsity(s) for s in range(20)]
    assert [b / a for a, b in zip(grown, grown[1:], strict=False)] == pytest.approx(
        [math.exp(-5 / 20)] * 19
    )


def test_constant_waits_for_its_start() -> None:
    ramp = Ramp("constant", 0.0, 0.6, 5, 9)
    assert [ramp.sparsity(step) for step in (4, 5, 9)] == [0.0, 0.6, 0.6]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"kind": "cubik"}, "unknown ramp 'cubik'. Did you mean 'cubic'"),
        ({"final": 1.5}, "final 1.5"),
        ({"initial": 0.9}, "initial 0.9"),
        ({"start": 5, "end": 4}, "start 5 and end 4"),
        ({"start": -1}, "start -1"),
        ({"interval": 0}, "found 0"),
        ({"final": float("nan")}, "final nan"),
    ],
)
def test_what_is_out_of_range_is_named(wrong: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Ramp(**wrong)
