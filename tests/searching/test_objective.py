import math

import pytest

from autoprune.errors import ConfigError
from autoprune.policy import Policy
from autoprune.searching.objective import WORST, Limit, Objective, best, front
from autoprune.searching.rows import Trial

KL = Objective((("kl", "minimize"),))
BOTH = Objective((("kl", "minimize"), ("reward", "maximize")))


def make_trial(number, values, state="complete", constraints=None):
    policy = Policy({})
    return Trial(
        number, state, "random", policy, {}, 0, "", "", values, {}, constraints or {}
    )


def trials_of(*values, **changes):
    return [
        make_trial(number=number, values=pair, **changes)
        for number, pair in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("limit", "measured", "excess"),
    [
        (Limit("perplexity", 20.0), 25.0, 0.25),
        (Limit("perplexity", 20.0), 20.0, 0.0),
        (Limit("accuracy", 0.5, "maximize"), 0.4, 0.2),
        (Limit("accuracy", 0.5, "maximize"), 0.75, -0.5),
        (Limit("reward", -2.0, "maximize"), -3.0, 0.5),
        (Limit("drop", 0.0), 0.25, 0.25),
        (Limit("perplexity", 20.0), math.nan, WORST),
    ],
    ids=["over", "on", "under", "above", "negative", "zero", "no number"],
)
def test_excess_is_a_share_of_the_bound(limit, measured, excess):
    found = limit.excess(
        {"perplexity": measured, "accuracy": measured} | {limit.metric: measured}
    )
    assert found == pytest.approx(excess)


def test_values_are_taken_in_the_order_of_the_goals():
    assert BOTH.values({"reward": 2.0, "size_bytes": 9.0, "kl": 1.0}) == (1.0, 2.0)
    assert BOTH.directions == ["minimize", "maximize"]


@pytest.mark.parametrize(
    "objective",
    [
        Objective((("kll", "minimize"),)),
        Objective((("kl", "minimize"),), (Limit("kll", 1.0),)),
    ],
    ids=["goal", "limit"],
)
def test_metric_that_nobody_measures_is_an_error(objective):
    with pytest.raises(ConfigError, match="unknown metric 'kll'. Did you mean 'kl'?"):
        objective.values({"kl": 1.0})


@pytest.mark.parametrize("goals", [(), (("kl", "minimize"), ("kl", "maximize"))])
def test_goals_are_at_least_one_and_each_once(goals):
    names = [name for name, _ in goals]
    with pytest.raises(ConfigError) as caught:
        Objective(goals)
    assert str(caught.value).endswith(f"each once; found {names}")


def test_best_is_the_first_of_the_least_feasible():
    trials = trials_of((0.5,), (0.2,), (0.2,))
    trials += [make_trial(number=3, values=(0.1,), constraints={"latency_ms": 0.1})]
    trials += [make_trial(number=4, values=(0.0,), state="diverged")]
    trials += [make_trial(number=5, values=(), state="failed")]
    found = best(trials, KL)
    assert found is not None and found.number == 1
    assert best(trials[3:], KL) is None


def test_best_of_a_reward_is_the_largest():
    found = best(trials_of((0.5,), (0.7,)), Objective((("reward", "maximize"),)))
    assert found is not None and found.number == 1


def test_best_of_several_goals_is_an_error():
    with pytest.raises(ConfigError, match="best in kl, reward; ask for the front"):
        best(trials_of((0.5, 0.5)), BOTH)


def test_front_holds_what_nothing_beats():
    trials = trials_of((3.0, 3.0), (1.0, 1.0), (2.0, 0.5), (1.0, 1.0), (2.0, 2.0))
    assert [trial.number for trial in front(trials, BOTH)] == [1, 4, 0]


def test_front_of_nothing_feasible_is_empty():
    assert front(trials_of((1.0, 1.0), constraints={"kl": 1.0}), BOTH) == []
