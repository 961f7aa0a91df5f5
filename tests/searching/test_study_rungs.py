"""Searches with rungs, and with slopes: what few windows tell, and what resumes."""

import math

import numpy as np
import optuna
import pytest
from autoprune_plugins.evolution import LAMBDA
from autoprune_plugins.evolution import register_samplers as evolution
from autoprune_plugins.gradient import PATIENCE
from autoprune_plugins.gradient import register_samplers as gradient
from toy_evaluators import WINDOW, SmoothEvaluator, WindowEvaluator

from autoprune.policy import Policy
from autoprune.searching.ends import Ends
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Objective, best
from autoprune.searching.rungs import incumbents, paired
from autoprune.searching.strategies import (
    Brief,
    PolicySampler,
    SamplerFactory,
    notes_of,
)
from autoprune.searching.study import run_study

KL = Objective((("kl", "minimize"),))
RUNGS = (2, 4, 8)
(EVOLUTION,), (GRADIENT,) = evolution(), gradient()
RANDOM = SamplerFactory(
    "random", lambda brief: optuna.samplers.RandomSampler(seed=brief.seed)
)
every_pruner = pytest.mark.parametrize(
    "pruner", ["race", "halving", "wilcoxon", "none"]
)


def noisy(problem):
    """Windows of different hardness, and noise of each policy's own."""
    weights = np.random.default_rng(9).random(len(problem.space.sites))
    hardness = np.linspace(2.0, 0.5, 8)

    def windows(policy):
        levels = problem.space.index(policy)
        noise = np.random.default_rng(levels).normal(0, 0.05, 8)
        return float(weights @ (levels + 1) ** 2) * hardness * (1 + noise)

    return WindowEvaluator(windows)


def search(run_dir, problem, evaluator, **settings):
    settings = {"sampler": RANDOM, "objective": KL, "seed": 0, **settings}
    names = [name for name in ("trials", "deadline", "stop") if name in settings]
    ends = Ends(**{name: settings.pop(name) for name in names})
    with Ledger.open(run_dir, {"space": problem.space.fingerprint}) as ledger:
        reason = run_study(problem, evaluator, ledger=ledger, ends=ends, **settings)
        return reason, ledger.trials(), ledger.slopes()


def interrupted(run_dir, problem, evaluator, parts, **settings):
    """Search in parts: killed after a row is written, and stopped by count."""

    def die(trial):
        if trial.number == parts[0] - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(run_dir, problem, evaluator(), on_trial=die, **settings)
    for trials in parts[1:]:
        found = search(run_dir, problem, evaluator(), **settings, trials=trials)
    return found


def uniform(problem):
    """The uniform policy of the largest size within the budget."""
    actions = problem.space.choices[problem.space.sites[0].name]
    policies = [Policy.uniform(problem.space.sites, action) for action in actions]
    return next(policy for policy in policies if problem.within(policy))


def without_times(rows):
    left_out = {"started", "finished", "timings"}
    return [{k: v for k, v in vars(t).items() if k not in left_out} for t in rows]


def test_pruned_row_has_few_windows_and_is_told_as_if_it_had_all(tmp_path, problem_of):
    problem = problem_of(10, 6)
    _, rows, _ = search(tmp_path, problem, noisy(problem), rungs=RUNGS, trials=40)
    pruned = [row for row in rows if row.state == "pruned"]
    complete = [row for row in rows if row.state == "complete"]
    assert len(pruned) > 10 and len(complete) > 2
    assert {len(row.windows) for row in complete} == {8}
    assert {len(row.windows) for row in pruned} <= {2, 4}
    for row in pruned:
        held = rows[incumbents(rows[: row.number], KL)[-1]]
        gap, error = paired(row.windows, held.windows)
        assert gap > error
        assert row.values == (np.mean(held.windows) + gap,)
        assert row.metrics["kl"] == np.mean(row.windows)
        assert row.values[0] > held.values[0]


class AtFirst(PolicySampler):
    """Proposes one policy after the other, on the first rung alone."""

    def propose(self):
        return np.array([len(self.brief.history), 0, 0]), {"rung": 0}


def test_pruned_row_is_never_the_best(tmp_path, problem_of):
    problem = problem_of(3, 4)
    kls = [4.0, 3.0, 8.0]
    evaluator = WindowEvaluator(
        lambda policy: [kls[problem.space.index(policy)[0]]] * 8
    )
    _, rows, _ = search(
        tmp_path,
        problem,
        evaluator,
        sampler=SamplerFactory("at first", AtFirst),
        rungs=RUNGS,
        proposals=[("whole", problem.space.at(np.zeros(3, dtype=np.int64)))],
        trials=3,
    )
    assert [row.state for row in rows] == ["complete", "pruned", "pruned"]
    assert [row.values[0] for row in rows] == kls
    assert best(rows, KL) is rows[0]
    assert Brief(0, 1, problem, rows).best() is rows[0]
    assert incumbents(rows, KL) == [0]


@every_pruner
@pytest.mark.parametrize("sampler", [RANDOM, EVOLUTION], ids=lambda one: one.name)
def test_stopped_and_resumed_is_as_if_it_had_run_through(
    tmp_path, problem_of, sampler, pruner
):
    problem = problem_of(8, 6, budget=0.5)
    settings = {"sampler": sampler, "pruner": pruner, "rungs": RUNGS}
    settings["proposals"] = [("uniform", uniform(problem))]
    _, through, _ = search(
        tmp_path / "through", problem, noisy(problem), trials=36, **settings
    )
    _, parts, _ = interrupted(
        tmp_path / "parts", problem, lambda: noisy(problem), (7, 20, 36), **settings
    )
    assert without_times(parts) == without_times(through)
    states = {row.state for row in through}
    alone = pruner == "none" and sampler is RANDOM
    assert states == ({"complete"} if alone else {"complete", "pruned"})


@every_pruner
def test_promoted_policy_is_another_row_with_more_windows(tmp_path, problem_of, pruner):
    problem = problem_of(12, 9, budget=0.5)
    evaluator = noisy(problem)
    _, rows, _ = search(
        tmp_path,
        problem,
        evaluator,
        sampler=EVOLUTION,
        pruner=pruner,
        rungs=RUNGS,
        proposals=[("uniform", uniform(problem))],
        trials=1 + 2 * (LAMBDA + 6 + 2),
    )
    for generation in range(2):
        noted = [(row, notes_of(row)) for row in rows[1:]]
        mine = [(row, n) for row, n in noted if n["generation"] == generation]
        stages = [[row for row, n in mine if n["stage"] == stage] for stage in range(3)]
        assert [len(stage) for stage in stages] == [LAMBDA, 6, 2]
        for stage, windows in zip(stages, RUNGS, strict=True):
            assert {len(row.windows) for row in stage} == {windows}
        for row in stages[1] + stages[2]:
            before = rows[notes_of(row)["from"]]
            assert row.policy == before.policy
            assert row.windows[: len(before.windows)] == before.windows
    asked = [(row.policy.fingerprint, len(row.windows)) for row in rows]
    assert len(set(asked)) == len(asked)
    # After the rival, which climbs, each is asked for once, on just its rung.
    generation = [2] * LAMBDA + [4] * 6 + [None] * 2
    assert evaluator.asked == [2, 4, None] + 2 * generation


@pytest.fixture
def slopes_problem(problem_of):
    return problem_of(24, 8, budget=0.5)


def by_gradient(run_dir, problem, evaluator=None, **settings):
    settings = {
        "sampler": GRADIENT,
        "proposals": [("uniform", uniform(problem))],
        **settings,
    }
    evaluator = evaluator or SmoothEvaluator(problem)
    return search(run_dir, problem, evaluator, **settings)


def test_gradient_beats_the_uniform_rival(tmp_path, slopes_problem):
    problem = slopes_problem
    _, rows, _ = by_gradient(tmp_path, problem, trials=15)
    assert rows[0].origin == "uniform"
    assert best(rows, KL).values[0] < 0.6 * rows[0].values[0]
    limit = problem.budgets[0].limit
    sizes = [problem.price("size_bytes", row.policy) for row in rows[1:]]
    assert all(0.998 * limit <= size <= limit for size in sizes)


@pytest.mark.parametrize("rungs", [(), RUNGS], ids=["whole", "rungs"])
def test_slopes_are_taken_at_incumbents_and_on_more_windows_after_a_refusal(
    tmp_path, slopes_problem, rungs
):
    evaluator = SmoothEvaluator(slopes_problem)
    _, rows, slopes = by_gradient(
        tmp_path, slopes_problem, evaluator, rungs=rungs, trials=15
    )
    # At the last incumbent they are taken once something is proposed after it.
    held = [n for n in incumbents(rows, KL) if n < len(rows) - 1]
    counts, turns = {}, []
    for row in rows[1:]:
        base = notes_of(row)["base"]
        assert base == max(n for n in held if n < row.number)
        turn = len(counts) - (base in counts)
        count = GRADIENT.tokens_at(turn) // WINDOW
        if base not in counts:
            counts[base] = count
        elif base != row.number - 1 and counts[base] < 8:
            counts[base] = min(8, counts[base] + count)
        else:
            continue
        turns.append(turn)
    assert evaluator.turns == turns
    assert len(turns) > len(counts) > 2
    assert {n: len(one.windows) for n, one in slopes.items()} == counts
    assert all(len(set(one.windows)) == len(one.windows) for one in slopes.values())


@every_pruner
def test_gradient_is_resumed_from_the_slopes_in_the_ledger(
    tmp_path, slopes_problem, pruner
):
    settings = {"rungs": RUNGS, "pruner": pruner, "sampler": GRADIENT}
    settings["proposals"] = [("uniform", uniform(slopes_problem))]
    whole = SmoothEvaluator(slopes_problem)
    _, through, slopes = by_gradient(
        tmp_path / "through", slopes_problem, whole, trials=16, **settings
    )
    made = []

    def evaluator():
        made.append(SmoothEvaluator(slopes_problem))
        return made[-1]

    _, parts, again = interrupted(
        tmp_path / "parts", slopes_problem, evaluator, (4, 9, 16), **settings
    )
    assert without_times(parts) == without_times(through)
    assert list(again) == list(slopes)
    for number, one in again.items():
        assert one.to_bytes() == slopes[number].to_bytes()
    # Nothing is taken again: the turns go on where they were.
    assert [turn for one in made for turn in one.turns] == whole.turns


def test_gradient_ends_when_nothing_is_to_be_gained(tmp_path, slopes_problem):
    reason, rows, slopes = by_gradient(tmp_path, slopes_problem, trials=200)
    assert reason == "exhausted"
    last = incumbents(rows, KL)[-1]
    assert len(rows) - 1 - last == PATIENCE
    assert max(slopes) == last
    reason, again, _ = by_gradient(tmp_path, slopes_problem, trials=200)
    assert (reason, len(again)) == ("exhausted", len(rows))


def test_gradient_starts_blind_without_a_rival(tmp_path, slopes_problem):
    _, rows, slopes = by_gradient(tmp_path, slopes_problem, proposals=(), trials=10)
    assert [notes_of(row).get("base") for row in rows[:2]] == [None, 0]
    assert 0 in slopes
    assert best(rows, KL).values[0] < rows[0].values[0]


def test_strategy_without_slopes_takes_none(tmp_path, problem_of):
    problem = problem_of(6, 4)
    evaluator = SmoothEvaluator(problem)
    _, rows, slopes = search(tmp_path, problem, evaluator, trials=5)
    assert (evaluator.turns, slopes) == ([], {})
    assert all(math.isfinite(row.values[0]) for row in rows)
