import math

import numpy as np
import optuna
import pytest
from toy_evaluators import WindowEvaluator, follow

from autoprune.policy import Policy
from autoprune.searching.judge import Judge
from autoprune.searching.objective import Objective
from autoprune.searching.rows import Trial
from autoprune.searching.rungs import (
    gives_up,
    incumbents,
    intermediate,
    make_pruner,
    paired,
    replaces,
    rungs_of,
)

KL = Objective((("kl", "minimize"),))
SPEED = Objective((("tokens_s", "maximize"),))


def row(windows=(), number=0, state="complete", **fields):
    if windows:
        fields = {"values": (float(np.mean(windows)),), **fields}
    return Trial(
        number, state, "test", Policy({}), {}, 0, "", "", windows=windows, **fields
    )


def study_of(pruner, rungs):
    return optuna.create_study(
        storage=optuna.storages.InMemoryStorage(), pruner=make_pruner(pruner, rungs)
    )


@pytest.mark.parametrize(
    ("tokens", "length", "total", "expected"),
    [
        ([], 512, 24, (24,)),
        ([2048, 512], 512, 24, (1, 4, 24)),
        ([100], 512, 24, (1, 24)),  # never none
        ([700, 800], 512, 24, (1, 2, 24)),  # to the nearest
        ([1000, 1100], 512, 24, (2, 24)),  # equal ones are one
        ([512 * 24, 10**9], 512, 24, (24,)),  # as many as there are, or more
        ([512], 512, 1, (1,)),
    ],
)
def test_rungs_are_ascending_windows_and_end_with_all(tokens, length, total, expected):
    assert rungs_of(tokens, length, total) == expected


def test_paired_by_hand():
    # Gaps 1, -1, 3: mean 1, variance (0 + 4 + 4) / 2 = 4, error 2 / sqrt(3).
    gap, error = paired((5.0, 2.0, 6.0), (4.0, 3.0, 3.0))
    assert gap == 1.0
    assert error == pytest.approx(2 / 3**0.5, abs=1e-15)


def test_paired_takes_the_windows_that_both_have():
    long = (4.0, 3.0, 3.0, 100.0)
    assert paired((5.0, 2.0, 6.0), long) == paired((5.0, 2.0, 6.0), long[:3])
    assert paired(long, (5.0, 2.0, 6.0))[0] == -1.0
    assert paired((5.0,), long) == (1.0, math.inf)
    assert paired((), long) == (0.0, math.inf)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_paired_with_what_diverged_has_no_finite_gap(value):
    gap, error = paired((value, 2.0), (4.0, 3.0))
    assert not math.isfinite(gap)
    assert math.isnan(error)


def test_equal_windows_have_no_gap_and_no_error():
    assert paired((1.0, 2.0, 4.0), (1.0, 2.0, 4.0)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ((3.0, 5.0), False),  # gaps -2, 0: exactly a standard error of 1
        ((3.0, 4.9375), True),
        ((3.0, 5.0625), False),
        ((5.0, 5.0), False),
        ((4.5, 4.5), True),  # the same gap in every window has no error
        ((5.5, 5.5), False),
    ],
)
def test_incumbent_is_replaced_beyond_a_standard_error(new, expected):
    old = row((5.0, 5.0))
    assert paired((3.0, 5.0), old.windows) == (-1.0, 1.0)
    assert replaces(row(new), old, KL) is expected


def test_one_window_has_no_error_so_any_gain_replaces():
    assert replaces(row((4.9,)), row((5.0,)), KL)
    assert not replaces(row((5.0,)), row((5.0,)), KL)


def test_without_windows_or_with_another_goal_any_gain_replaces():
    assert replaces(row(values=(4.9,)), row(values=(5.0,)), KL)
    assert not replaces(row(values=(5.0,)), row(values=(5.0,)), KL)
    windows = (5.0, 1.0)
    fast, slow = (row(windows, values=(value,)) for value in (9.0, 8.0))
    assert replaces(fast, slow, SPEED)
    assert not replaces(slow, fast, SPEED)


def test_incumbents_follow_each_other():
    rows = [
        row(state="failed", number=0),
        row((5.0, 5.0), 1),
        row((3.0, 5.0), 2),  # exactly on the border
        row((1.0,), 3, "pruned"),
        row((1.0, 1.0), 4, constraints={"ppl": 0.1}),
        row((4.0, 4.0), 5),
        row((4.5, 4.5), 6),
        row((3.0, 3.5), 7),
    ]
    assert incumbents(rows, KL) == [1, 5, 7]
    assert incumbents([], KL) == []


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((7.0, 5.0), False),  # gaps 2, 0: exactly one standard error of 1
        ((7.0, 5.125), True),
        ((7.0, 4.875), False),
        ((4.0, 4.0), False),
        ((5.5, 5.5), True),
        ((9.0,), False),  # one window tells nothing
    ],
)
def test_race_is_given_up_beyond_one_standard_error(windows, expected):
    asked = study_of("race", (2, 4)).ask()
    held = row((5.0, 5.0, 1.0, 1.0))
    assert gives_up("race", asked, windows, held, 0) is expected
    assert not gives_up("race", asked, windows, None, 0)


def test_halving_keeps_the_best_at_a_rung():
    study = study_of("halving", (2, 4, 8))  # doubles, so one in two goes on
    ends = []
    for windows in [(4.0, 6.0), (6.0, 6.0), (4.0, 4.0), (1.0, 3.0)]:
        asked = study.ask()
        ends.append(gives_up("halving", asked, windows, None, 0))
        study.tell(asked, float(np.mean(windows)))
    assert ends == [False, True, False, False]
    assert study.trials[3].intermediate_values == {2: 2.0}


@pytest.mark.parametrize(
    ("rungs", "factor"),
    [((1, 4, 16), 4), ((4, 8), 2), ((3, 4), 2), ((2, 24), 12), ((8,), 2)],
)
def test_halving_takes_its_factor_from_the_rungs(rungs, factor):
    pruner = make_pruner("halving", rungs)
    assert pruner._reduction_factor == factor
    assert pruner._min_resource == rungs[0]


def test_wilcoxon_gives_up_what_is_worse_in_every_window():
    study = study_of("wilcoxon", (4, 8))
    first = study.ask()
    assert not gives_up("wilcoxon", first, (1.0, 2.0, 3.0, 4.0), None, 0)
    study.tell(first, 2.5)
    # Four of four worse: p = 1/16, below 0.1. Three of four: the least is 2/16.
    worse, mixed = study.ask(), study.ask()
    assert gives_up("wilcoxon", worse, (1.1, 2.2, 3.3, 4.4), None, 0)
    assert not gives_up("wilcoxon", mixed, (0.9, 2.2, 3.3, 4.4), None, 0)


def test_wilcoxon_is_told_of_a_window_once():
    asked = study_of("wilcoxon", (2, 4, 8)).ask()
    gives_up("wilcoxon", asked, (1.0, 2.0), None, 0)
    gives_up("wilcoxon", asked, (1.0, 2.0, 3.0, 4.0), None, 2)
    told = asked.study.trials[0].intermediate_values
    assert told == {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}


def test_without_a_pruner_nothing_is_given_up():
    asked = study_of("none", (2, 4)).ask()
    assert not gives_up("none", asked, (9.0, 9.0), row((5.0, 5.0)), 0)
    assert make_pruner("none", (2, 4)) is make_pruner("race", (2, 4)) is None


@pytest.mark.parametrize("pruner", ["race", "halving", "wilcoxon", "none"])
@pytest.mark.parametrize("wanted", [None, 0, 1, 2])
def test_a_rebuilt_study_is_told_what_the_live_one_was(pruner, wanted):
    rungs = (2, 4, 8)
    study = study_of(pruner, rungs)
    trials = [row(tuple(np.arange(8.0)), 0)]
    rng = np.random.default_rng(0)
    lengths = set()
    for number in range(1, 12):
        windows = np.arange(8.0) + rng.normal(0.3, 0.5) + rng.normal(0, 0.3, 8)
        windows[3] *= np.inf if number == 5 else 1
        judge = Judge(KL, rungs, pruner, trials)
        evaluator = WindowEvaluator(lambda policy, w=windows: w)
        asked = study.ask()
        score, whole = follow(judge, evaluator, asked, Policy({}), wanted)
        state, values = judge.verdict(score, None, whole)
        notes = {} if wanted is None else {"note:rung": wanted}
        done = row(score.windows, number, state, values=values, system_attrs=notes)
        live = study.trials[-1].intermediate_values
        assert intermediate(pruner, done, rungs) == live
        study.tell(asked, values)
        lengths.add(len(score.windows))
    if wanted is not None:
        assert lengths == {rungs[wanted]}
    elif pruner != "none":
        assert 8 in lengths and len(lengths) > 1
