import logging
import math

import optuna
import pytest
from toy_evaluators import WindowEvaluator, follow

from autoprune.policy import Policy
from autoprune.searching.judge import FAILURES, Judge
from autoprune.searching.objective import Objective
from autoprune.searching.rows import Trial
from autoprune.searching.trial import Score

KL = Objective((("kl", "minimize"),))
BOTH = Objective((("kl", "minimize"), ("size_bytes", "minimize")))
RUNGS = (2, 4, 6)
NOW = (3.0, 5.0, 4.0, 4.0, 2.0, 6.0)  # of the incumbent: mean 4
POLICY = Policy({})


def row(number, windows, state="complete", **fields):
    value = sum(windows) / len(windows) if windows else 0.0
    fields = {"values": (value,), "windows": tuple(windows), **fields}
    return Trial(number, state, "test", POLICY, {}, 0, "", "", **fields)


def judge_of(*, pruner="race", trials=(), rungs=RUNGS, objective=KL):
    return Judge(objective, rungs, pruner, list(trials))


def ask():
    storage = optuna.storages.InMemoryStorage()
    return optuna.create_study(storage=storage).ask()


def judged(windows, *, wanted=None, **settings):
    """Judge a policy of known windows beside the incumbent; tell what was asked."""
    evaluator = WindowEvaluator(lambda policy: windows)
    judge = judge_of(**{"trials": [row(0, NOW)], **settings})
    score, whole = follow(judge, evaluator, ask(), POLICY, wanted)
    return evaluator.asked, score, judge.verdict(score, None, whole)


def test_what_loses_the_race_is_measured_no_further():
    # Gaps 1, 3: mean 2, error 1.
    asked, score, (state, values) = judged((4.0, 8.0, 0.0, 0.0, 0.0, 0.0))
    assert asked == [2]
    assert score.windows == (4.0, 8.0)
    assert score.metrics == {"kl": 6.0}
    assert (state, values) == ("pruned", (6.0,))  # 4 + 2


def test_what_is_told_is_the_incumbents_mean_moved_by_the_gap():
    # On easy windows: its own mean is below the incumbent's, and yet it is worse.
    trials = [row(0, (1.0, 1.0, 4.0, 6.0, 8.0, 4.0))]
    _, score, verdict = judged((2.0, 2.5, 0.0, 0.0, 0.0, 0.0), trials=trials)
    assert score.metrics == {"kl": 2.25}
    assert verdict == ("pruned", (4.0 + 1.25,))


def test_race_is_held_at_every_rung():
    # Gaps 1, -1 and at the next rung 1, -1, 3, 3: mean 1.5, error 0.957.
    asked, score, (state, _) = judged((4.0, 4.0, 7.0, 7.0, 0.0, 0.0))
    assert asked == [2, 4]
    assert (len(score.windows), state) == (4, "pruned")


def test_what_holds_its_place_is_complete():
    windows = (3.5, 4.0, 4.5, 3.0, 9.0, 9.0)
    asked, score, verdict = judged(windows)
    assert asked == [2, 4, None]
    assert score.windows == windows
    assert verdict == ("complete", (5.5,))


@pytest.mark.parametrize("settings", [{"trials": ()}, {"pruner": "none"}], ids=str)
def test_without_a_rival_or_a_pruner_all_windows_are_measured(settings):
    asked, _, (state, _) = judged((9.0,) * 6, **settings)
    assert (asked, state) == ([2, 4, None], "complete")


def test_without_rungs_all_is_measured_at_once():
    asked, _, (state, _) = judged((9.0,) * 6, rungs=())
    assert (asked, state) == ([None], "complete")


@pytest.mark.parametrize(("wanted", "asked"), [(0, 2), (1, 4), (2, None)])
@pytest.mark.parametrize("pruner", ["race", "halving"])
def test_the_rung_that_a_strategy_wants_is_measured_whole(wanted, asked, pruner):
    found, score, (state, values) = judged((9.0,) * 6, wanted=wanted, pruner=pruner)
    assert found == [asked]
    assert len(score.windows) == RUNGS[wanted]
    assert state == ("complete" if wanted == 2 else "pruned")
    assert values == ((9.0,) if wanted == 2 else (4.0 + 5.0,))


def test_pruned_without_an_incumbent_is_told_what_was_measured():
    _, _, verdict = judged((9.0, 7.0, 0.0, 0.0, 0.0, 0.0), wanted=0, trials=())
    assert verdict == ("pruned", (8.0,))


def test_other_metrics_than_the_kl_are_told_as_measured():
    goal = Objective((("perplexity", "minimize"),))
    judge = judge_of(objective=goal, trials=[row(0, NOW)])
    score = Score({"kl": 6.0, "perplexity": 17.0}, (4.0, 8.0))
    assert judge.verdict(score, None, False) == ("pruned", (17.0,))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_diverged(whole, value):
    trials = [row(0, NOW), row(1, (9.0,) * 6), row(2, (99.0, 99.0), "pruned")]
    judge = judge_of(trials=trials)
    score = Score({"kl": value}, (3.0, value))
    assert judge.verdict(score, None, whole) == ("diverged", (18.0,))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("pruner", ["race", "halving", "wilcoxon", "none"])
def test_what_diverges_at_a_rung_is_measured_no_further(value, pruner):
    windows = (4.0, 4.0, value, 4.0, 2.0, 6.0)
    asked, score, verdict = judged(windows, pruner=pruner)
    assert asked == [2, 4]
    assert len(score.windows) == 4
    assert verdict == ("diverged", (8.0,))


def test_error_is_a_failed_trial_and_the_third_in_a_row_is_raised(caplog):
    judge = judge_of(rungs=())
    errors = [OSError("0"), OSError("1"), None, *map(OSError, "23")]
    assert len(errors) == FAILURES + 2
    with caplog.at_level(logging.WARNING):
        for number, error in enumerate(errors):
            judge.hear(number, error)
            if error is not None:
                assert judge.verdict(Score({}), error, False) == ("failed", ())
            judge.raise_if_failing()
    assert caplog.text.count("failed: ") == 4
    judge.hear(5, OSError("4"))
    with pytest.raises(OSError, match="4"):
        judge.raise_if_failing()


def test_incumbent_is_taken_from_the_rows_and_kept():
    trials = [row(0, NOW), row(1, (2.0,) * 6, "pruned"), row(2, (2.0,) * 6)]
    judge = judge_of(trials=trials)
    assert judge.incumbent is trials[2]
    better, worse = row(3, (1.0,) * 6), row(4, (1.5,) * 6)
    judge.consider(row(5, (0.5, 0.5), "pruned"))
    assert judge.incumbent is trials[2]
    judge.consider(better)
    judge.consider(worse)
    judge.consider(row(6, (0.5,) * 6, constraints={"latency_ms": 0.1}))
    assert judge.incumbent is better


def test_several_goals_have_no_incumbent():
    trials = [row(0, NOW, values=(4.0, 9.0))]
    judge = judge_of(trials=trials, objective=BOTH)
    judge.consider(row(1, (1.0,) * 6, values=(1.0, 9.0)))
    assert judge.incumbent is None
