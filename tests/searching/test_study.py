import math
import time

import numpy as np
import optuna
import pytest
from toy_evaluators import FormulaEvaluator

from autoprune.errors import ConfigError, MethodError, PolicyError, RunError
from autoprune.policy import Action, Policy
from autoprune.searching.ends import Ends
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Limit, Objective
from autoprune.searching.rows import Trial
from autoprune.searching.samplers import derive_seed
from autoprune.searching.strategies import SamplerFactory
from autoprune.searching.study import run_study
from autoprune.searching.trial import Evaluator, Score

KL = Objective((("kl", "minimize"),))
BOTH = Objective((("kl", "minimize"), ("size_bytes", "minimize")))

RANDOM = SamplerFactory(
    "random", lambda brief: optuna.samplers.RandomSampler(seed=brief.seed)
)
NSGA2 = SamplerFactory(
    "nsga2",
    lambda brief: optuna.samplers.NSGAIISampler(population_size=4, seed=brief.seed),
)
TPE = SamplerFactory(
    "tpe",
    lambda brief: optuna.samplers.TPESampler(
        multivariate=True, n_startup_trials=4, seed=brief.seed
    ),
    changes=4,
)
every_sampler = pytest.mark.parametrize(
    "sampler", [RANDOM, NSGA2, TPE], ids=lambda s: s.name
)


class Formula(FormulaEvaluator):
    """Measures by a formula, and counts; raises where a test says so."""

    def __init__(self, problem, raises=None):
        self.problem = problem
        self.raises = raises or {}
        self.seen = []
        self.weights = np.random.default_rng(9).random(len(problem.space.sites))

    def measure(self, policy, windows=None, *, near=None):
        number = len(self.seen)
        self.seen.append(policy)
        if number in self.raises:
            raise self.raises[number]
        levels = self.problem.space.index(policy)
        kl = float(self.weights @ (levels + 1) ** 2)
        size = self.problem.price("size_bytes", policy)
        return Score({"kl": kl, "size_bytes": size})


def evaluator_of(problem, given):
    """Take what a test gives: an evaluator, a formula, or nothing."""
    if given is None:
        return Formula(problem)
    return given if isinstance(given, Evaluator) else FormulaEvaluator(given)


def search(run_dir, problem, evaluate=None, **settings):
    settings = {"sampler": RANDOM, "objective": KL, "seed": 0, **settings}
    names = [name for name in ("trials", "deadline", "stop") if name in settings]
    ends = Ends(**{name: settings.pop(name) for name in names})
    with Ledger.open(run_dir, {"space": problem.space.fingerprint}) as ledger:
        reason = run_study(
            problem,
            evaluator_of(problem, evaluate),
            ledger=ledger,
            ends=ends,
            **settings,
        )
        return reason, ledger.trials()


def uniform(problem, sparsity):
    action = Action.parse(f"wanda(sparsity={sparsity})")
    return Policy.uniform(problem.space.sites, action)


@every_sampler
@pytest.mark.parametrize("objective", [KL, BOTH], ids=["one", "two"])
@pytest.mark.parametrize("budget", [None, 0.5], ids=["free", "budget"])
def test_stopped_and_resumed_is_as_if_it_had_run_through(
    tmp_path, problem_of, sampler, objective, budget
):
    problem = problem_of(10, 6, budget=budget)
    first = [(f"uniform {s}", uniform(problem, s)) for s in (0.5, 0.6, 0.3)]
    limited = Objective(objective.goals, (Limit("kl", 60.0),))
    settings = {"sampler": sampler, "objective": limited, "proposals": first}
    _, through = search(tmp_path / "through", problem, trials=18, **settings)

    killed = Formula(problem, {5: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "parts", problem, killed, trials=18, **settings)

    def die_after_9(trial):
        if trial.number == 9:  # its row is on disk, the study's reader is gone
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "parts", problem, on_trial=die_after_9, trials=18, **settings)
    search(tmp_path / "parts", problem, trials=13, **settings)
    reason, parts = search(tmp_path / "parts", problem, trials=18, **settings)

    assert reason == "trials"
    assert [trial.params for trial in parts] == [trial.params for trial in through]
    assert [t.system_attrs for t in parts] == [t.system_attrs for t in through]
    assert [trial.origin for trial in parts] == [trial.origin for trial in through]
    assert [trial.number for trial in parts] == list(range(18))


def test_resumed_study_has_the_parents_of_every_generation(tmp_path, problem_of):
    problem = problem_of(10, 6)
    search(tmp_path, problem, sampler=NSGA2, trials=14)
    with Ledger.read(tmp_path) as ledger:
        parents = {key: len(ids) for key, ids in ledger.study_attrs.items()}
    assert parents == {f"NSGAIISampler:parent:{g}": 4 for g in (1, 2, 3)}


@every_sampler
def test_no_policy_is_measured_twice(tmp_path, problem_of, sampler):
    problem = problem_of(2, 4)
    evaluate = Formula(problem)
    for trials in (5, 40):
        reason, rows = search(
            tmp_path, problem, evaluate, sampler=sampler, trials=trials
        )
    assert reason == "exhausted"
    assert len(rows) == len(evaluate.seen) == len(set(evaluate.seen)) == 16


def test_space_of_one_policy_is_measured_once(tmp_path, problem_of):
    reason, rows = search(tmp_path, problem_of(3, 1), trials=5)
    assert (reason, len(rows)) == ("exhausted", 1)


def test_row_holds_all_there_is_to_know(tmp_path, problem_of):
    problem = problem_of(4, 3)
    evaluate = Formula(problem)
    _, (row, *_) = search(tmp_path, problem, evaluate, seed=5, trials=2)
    assert row.policy == evaluate.seen[0] == problem.space.policy(row.params)
    assert (row.origin, row.state, row.error) == ("random", "complete", None)
    assert row.seed == derive_seed(5, 0)
    assert row.values == (row.metrics["kl"],)
    assert row.metrics["size_bytes"] == problem.price("size_bytes", row.policy)
    assert set(row.timings) == {"slopes_s", "propose_s", "put_s", "evaluate_s"}
    assert row.started <= row.finished


def test_row_is_on_disk_before_anybody_hears_of_it(tmp_path, problem_of):
    heard = []

    def on_trial(trial):
        with Ledger.read(tmp_path) as reader:
            heard.append((trial.number, len(reader.trials())))

    search(tmp_path, problem_of(4, 3), on_trial=on_trial, trials=3)
    assert heard == [(0, 1), (1, 2), (2, 3)]


def test_proposals_come_first_but_none_twice_or_over_the_budget(tmp_path, problem_of):
    problem = problem_of(20, 9, budget=0.5)
    low, lower, high = (uniform(problem, s) for s in (0.8, 0.9, 0.1))
    proposals = [("low", low), ("high", high), ("again", low), ("lower", lower)]
    _, rows = search(tmp_path, problem, proposals=proposals, trials=3)
    assert [row.origin for row in rows] == ["low", "lower", "random"]
    proposals.insert(0, ("lowest", uniform(problem, 0.7)))
    _, rows = search(tmp_path, problem, proposals=proposals, trials=5)
    assert [row.origin for row in rows[3:]] == ["lowest", "random"]


def test_proposal_that_does_not_fit_the_space_is_an_error(tmp_path, problem_of):
    problem = problem_of(3, 4)
    with pytest.raises(PolicyError, match=r"unknown action 'wanda\(sparsity=0.9\)'"):
        search(tmp_path, problem, proposals=[("x", uniform(problem, 0.9))], trials=2)


def test_failed_trial_is_a_row_and_the_search_goes_on(tmp_path, problem_of):
    problem = problem_of(6, 4)
    evaluate = Formula(problem, {1: MethodError("no such group"), 2: OSError("disk")})
    _, rows = search(tmp_path, problem, evaluate, sampler=NSGA2, trials=6)
    assert [row.state for row in rows] == ["complete", "failed", "failed"] + [
        "complete"
    ] * 3
    assert [row.error for row in rows[1:3]] == [
        "MethodError: no such group",
        "OSError: disk",
    ]
    assert (rows[1].values, rows[1].metrics, rows[1].constraints) == ((), {}, {})
    _, more = search(tmp_path, problem, sampler=NSGA2, trials=8)
    assert len({row.policy for row in more}) == 8


def test_three_failures_in_a_row_end_the_search_with_the_last(tmp_path, problem_of):
    problem = problem_of(6, 4)
    errors = {n: MethodError(f"number {n}") for n in (0, 2, 3, 4)}
    with pytest.raises(MethodError, match="number 4"):
        search(tmp_path, problem, Formula(problem, errors), trials=9)
    with Ledger.read(tmp_path) as ledger:
        assert [t.state for t in ledger.trials()].count("failed") == 4


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_divergence_is_a_bad_result(tmp_path, problem_of, value, direction):
    values = iter([value, 3.0, -7.0, value])
    objective = Objective((("kl", direction), ("size_bytes", "minimize")))

    def evaluate(policy):
        return {"kl": next(values), "size_bytes": 5.0}

    _, rows = search(
        tmp_path, problem_of(6, 4), evaluate, objective=objective, trials=4
    )
    assert [row.state for row in rows] == [
        "diverged",
        "complete",
        "complete",
        "diverged",
    ]
    assert repr(rows[0].metrics["kl"]) == repr(value)
    sign = 1 if direction == "minimize" else -1
    assert rows[0].values == (sign * 1e6, 5.0)
    worst = {"minimize": 6.0, "maximize": -14.0}[direction]
    assert rows[3].values == (worst, 5.0)


def test_divergence_beside_the_goal_is_divergence(tmp_path, problem_of):
    def evaluate(policy):
        return {"kl": 1.0, "perplexity": math.inf}

    _, (row,) = search(tmp_path, problem_of(6, 4), evaluate, trials=1)
    assert (row.state, row.values, row.feasible) == ("diverged", (1.0,), False)


def test_limits_are_set_on_every_trial_that_has_metrics(tmp_path, problem_of):
    problem = problem_of(6, 4)
    values = iter([2.0, 8.0, math.nan])
    objective = Objective(KL.goals, (Limit("latency_ms", 4.0), Limit("kl", 9.0)))

    def evaluate(policy):
        return {"kl": 1.0, "latency_ms": next(values)}

    _, rows = search(tmp_path, problem, evaluate, objective=objective, trials=3)
    assert [row.constraints["latency_ms"] for row in rows] == [-0.5, 1.0, 1e6]
    assert [row.feasible for row in rows] == [True, False, False]
    assert rows[0].system_attrs["constraints:latency_ms"] == -0.5


def test_goal_that_is_not_measured_ends_the_search(tmp_path, problem_of):
    with pytest.raises(ConfigError, match="unknown metric 'kl'. Known: ppl"):
        search(tmp_path, problem_of(6, 4), lambda policy: {"ppl": 1.0}, trials=1)


def test_stop_is_asked_between_trials(tmp_path, problem_of):
    answers = iter([False, False, True])
    reason, rows = search(tmp_path, problem_of(6, 4), stop=lambda: next(answers))
    assert (reason, len(rows)) == ("stopped", 2)


def test_no_trial_begins_that_would_end_after_the_deadline(tmp_path, problem_of):
    problem = problem_of(6, 4)

    def evaluate(policy):
        time.sleep(0.2)
        return {"kl": 1.0}

    deadline = time.monotonic() + 0.7
    reason, rows = search(tmp_path, problem, evaluate, deadline=deadline)
    assert reason == "time"
    assert time.monotonic() < deadline + 0.2
    assert 1 <= len(rows) <= 3
    deadline = time.monotonic() + 0.1  # less than the trials before took
    reason, again = search(tmp_path, problem, evaluate, deadline=deadline)
    assert (reason, len(again)) == ("time", len(rows))


def test_ledger_with_a_gap_is_refused(tmp_path, problem_of):
    problem = problem_of(6, 4)
    _, (row,) = search(tmp_path, problem, trials=1)
    with Ledger.open(tmp_path, {"space": problem.space.fingerprint}) as ledger:
        ledger.add(Trial(**{**vars(row), "number": 2}))
    with pytest.raises(RunError, match="lacks trial 1"):
        search(tmp_path, problem, trials=4)
