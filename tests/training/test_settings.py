"""Budgets that are never exceeded, the order of windows, and when to stop."""

from collections import Counter
from typing import Any

import pytest

from autoprune.errors import ConfigError
from autoprune.training.settings import TrainingSettings


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"tokens": 10_000} | changes)


@pytest.mark.parametrize("tokens", [600, 601, 1199, 1200, 123_456])
def test_the_budget_is_never_exceeded(tokens: int) -> None:
    one = settings(tokens=tokens, batch=3, accumulation=2)
    taken = one.steps(100) * 3 * 2 * 100
    assert taken <= tokens < taken + 600


def test_a_budget_below_one_step_is_told() -> None:
    with pytest.raises(ConfigError, match=r"599 tokens .* 3 x 2 windows of 100.* 600"):
        settings(tokens=599, batch=3, accumulation=2).steps(100)


def test_every_pass_takes_every_window_once() -> None:
    one = settings(batch=3, accumulation=2)
    order = one.order(10, steps=4).tolist()
    assert len(order) == 24
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert set(Counter(order).values()) == {2, 3}
    assert order == one.order(10, steps=4).tolist()
    assert order != settings(batch=3, accumulation=2, seed=1).order(10, 4).tolist()
    # What comes first does not depend on how much comes after.
    assert order[:6] == one.order(10, steps=1).tolist()


@pytest.mark.parametrize(
    ("changes", "losses", "reason"),
    [
        ({}, [3.0, 9.0, 9.0, 9.0], None),
        ({"target": 2.0}, [3.0, 2.1], None),
        ({"target": 2.0}, [3.0, 2.0], "target"),
        ({"target": 2.0}, [1.0, 3.0], None),
        ({"patience": 2}, [], None),
        ({"patience": 2}, [3.0, 2.0, 2.0], None),
        ({"patience": 2}, [3.0, 2.0, 2.0, 2.5], "patience"),
        ({"patience": 1}, [3.0, 3.0], "patience"),
        ({"patience": 2, "target": 1.0}, [3.0, 4.0, 1.0], "target"),
        ({"patience": 2}, [3.0, 4.0, float("nan")], "patience"),
    ],
)
def test_when_it_stops(
    changes: dict[str, Any], losses: list[float], reason: str | None
) -> None:
    assert settings(**changes).stops(losses) == reason


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"tokens": 0}, "tokens of a training is from 1 up, found 0"),
        ({"learning_rate": -1e-4}, "learning_rate .* from 0 to 10, found -0.0001"),
        ({"learning_rate": 0.0}, "rate of 0 trains nothing"),
        ({"learning_rate": float("nan")}, "found nan"),
        ({"schedule": "cosin"}, "schedule 'cosin'. Did you mean 'cosine'"),
        ({"warmup": 1.5}, "warmup .* from 0 to 1, found 1.5"),
        ({"batch": 0}, "batch .* found 0"),
        ({"accumulation": 0}, "accumulation .* found 0"),
        ({"weight_decay": -1.0}, "weight_decay .* found -1.0"),
        ({"clip": -1.0}, "clip .* found -1.0"),
        ({"seed": -1}, "seed .* found -1"),
        ({"checkpoint_every": 0}, "checkpoint_every .* found 0"),
        ({"patience": 0}, "patience .* found 0"),
    ],
)
def test_what_is_out_of_range_is_named(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        settings(**wrong)
